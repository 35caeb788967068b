// How this model wants to be run, for ONNX Runtime's C++ API: onnxruntime_cxx_api.h, -lonnxruntime

#include <onnxruntime_cxx_api.h>

Ort::Session make_session(Ort::Env& env, const char* model = "$model") {
  Ort::SessionOptions options;
  options.SetGraphOptimizationLevel(GraphOptimizationLevel::ORT_ENABLE_ALL);
  options.SetIntraOpNumThreads($threads);  // 0: the runtime chooses
$settings
  return Ort::Session(env, model, options);
}
