"""The algorithms, one file each: prepare the float graph, solve for codes, lower to operators."""

from onnxq.passes.lower.add_low_rank import AddLowRank
from onnxq.passes.lower.codebook_matmul import CodebookMatMul
from onnxq.passes.lower.dynamic import Dynamic
from onnxq.passes.lower.expand import Expand
from onnxq.passes.lower.float16 import Float16
from onnxq.passes.lower.fuse_integer import FuseInteger
from onnxq.passes.lower.insert_qdq import InsertQDQ
from onnxq.passes.lower.integer_only import IntegerOnly
from onnxq.passes.lower.matmul_nbits import MatMulNBits
from onnxq.passes.prepare.awq import AWQ
from onnxq.passes.prepare.compose import Compose
from onnxq.passes.prepare.equalize import Equalize
from onnxq.passes.prepare.fold_batchnorm import FoldBatchNorm
from onnxq.passes.prepare.normalize import Normalize
from onnxq.passes.prepare.smoothquant import SmoothQuant
from onnxq.passes.prepare.split_outliers import SplitOutliers
from onnxq.passes.prepare.widen import Widen
from onnxq.passes.solve.adaround import AdaRound
from onnxq.passes.solve.assign import Assign
from onnxq.passes.solve.autoround import AutoRound
from onnxq.passes.solve.bias_correct import BiasCorrect
from onnxq.passes.solve.calibrate import Calibrate
from onnxq.passes.solve.codebook import Codebook
from onnxq.passes.solve.coordinate_descent import CoordinateDescent
from onnxq.passes.solve.fold_fake_quant import FoldFakeQuant
from onnxq.passes.solve.gptq import GPTQ
from onnxq.passes.solve.gptq_codebook import GPTQCodebook
from onnxq.passes.solve.hqq import HQQ
from onnxq.passes.solve.lattice import Lattice
from onnxq.passes.solve.low_rank import LowRank
from onnxq.passes.solve.quantize_bias import QuantizeBias
from onnxq.passes.solve.reconstruct_layers import ReconstructLayers
from onnxq.passes.solve.round_to_nearest import RoundToNearest
from onnxq.passes.solve.search_scales import SearchScales
from onnxq.passes.solve.spare_quiet import SpareQuiet
from onnxq.passes.solve.spare_slow import SpareSlow

__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "AdaRound",
    "AddLowRank",
    "Assign",
    "AutoRound",
    "BiasCorrect",
    "Calibrate",
    "Codebook",
    "CodebookMatMul",
    "Compose",
    "CoordinateDescent",
    "Dynamic",
    "Equalize",
    "Expand",
    "Float16",
    "FoldBatchNorm",
    "FoldFakeQuant",
    "FuseInteger",
    "GPTQCodebook",
    "InsertQDQ",
    "IntegerOnly",
    "Lattice",
    "LowRank",
    "MatMulNBits",
    "Normalize",
    "QuantizeBias",
    "ReconstructLayers",
    "RoundToNearest",
    "SearchScales",
    "SmoothQuant",
    "SpareQuiet",
    "SpareSlow",
    "SplitOutliers",
    "Widen",
]
