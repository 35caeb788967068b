// How this model wants to be run, for ONNX Runtime's C++ API: onnxruntime_cxx_api.h, -lonnxruntime,
// and the library of onnxruntime-qnn beside the program.

#include <onnxruntime_cxx_api.h>

#include <string>
#include <unordered_map>
#include <vector>

Ort::Session make_session(Ort::Env& env, const char* provider_library, const char* backend,
                          const char* model = "$model") {
  env.RegisterExecutionProviderLibrary("QNNExecutionProvider", provider_library);
  std::vector<Ort::ConstEpDevice> devices;
  for (const auto& device : env.GetEpDevices()) {
    if (std::string(device.EpName()) == "QNNExecutionProvider") devices.push_back(device);
  }
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads($threads);  // 0: the runtime chooses
$settings
  std::unordered_map<std::string, std::string> values{{"backend_path", backend}$options};
  options.AppendExecutionProvider_V2(env, devices, values);
  return Ort::Session(env, model, options);
}
