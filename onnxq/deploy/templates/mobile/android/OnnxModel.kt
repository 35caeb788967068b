import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import android.content.Context

/** $model from the app's assets, with the session options it was tested with. */
class OnnxModel(context: Context) : AutoCloseable {
    private val environment = OrtEnvironment.getEnvironment()
    private val session: OrtSession

    init {
        val options = OrtSession.SessionOptions()
        options.setOptimizationLevel(OrtSession.SessionOptions.OptLevel.ALL_OPT)
        options.setIntraOpNumThreads($threads) // 0: the runtime chooses
$settings
        val bytes = context.assets.open("$model").use { it.readBytes() }
        session = environment.createSession(bytes, options)
    }

    /** Inputs: $inputs. Close the result when you have read it. */
    fun run(inputs: Map<String, OnnxTensor>): OrtSession.Result = session.run(inputs)

    override fun close() = session.close()
}
