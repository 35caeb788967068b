import Foundation
import onnxruntime_objc

/// $model from the app's bundle, with the session options it was tested with.
final class OnnxModel {
    private let environment: ORTEnv
    private let session: ORTSession

    init(bundle: Bundle = .main) throws {
        guard let path = bundle.path(forResource: "$stem", ofType: "$suffix") else {
            throw CocoaError(.fileNoSuchFile)
        }
        environment = try ORTEnv(loggingLevel: .warning)
        let options = try ORTSessionOptions()
        try options.setGraphOptimizationLevel(.all)
        try options.setIntraOpNumThreads($threads) // 0: the runtime chooses
$settings
        session = try ORTSession(env: environment, modelPath: path, sessionOptions: options)
    }

    /// Inputs: $inputs. Outputs: $outputs.
    func run(_ inputs: [String: ORTValue]) throws -> [String: ORTValue] {
        try session.run(withInputs: inputs, outputNames: [$output_names], runOptions: nil)
    }
}
