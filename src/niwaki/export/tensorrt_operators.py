"""The ONNX operators that TensorRT's parser takes, and which of a file's it does not.

Source: onnx/onnx-tensorrt, docs/operators.md of TensorRT 10.1 (commit 96e7811, June 2024), the rows marked "Y";
operator sets 9 to 20. Later versions take more. Restrictions within an operator (kinds of numbers, inputs that must be
constants) are not checked.
"""

from pathlib import Path

from niwaki.export.runtimes import unreadable

VERSION = "10.1"
HIGHEST_OPSET = 20
NAMES = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil Celu
Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear
Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm
GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization GRU Hardmax
HardSigmoid HardSwish Identity If ImageScaler InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less
LessOrEqual Log LogSoftmax Loop LpNormalization LpPool LRN LSTM MatMul Max MaxPool Mean MeanVarianceNormalization
Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or Pad ParametricSoftplus Pow PRelu QuantizeLinear
RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
ReverseSequence RNN RoiAlign Round ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign
Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile
TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
SUPPORTED = frozenset(NAMES.split())


def unsupported_by_tensorrt(file: str | Path) -> dict[str, int]:
    """What a TensorRT of version 10.1 would refuse in an ONNX file: operator -> how many nodes; empty where nothing.

    Operators of other domains are written "domain::Name"; "opset N" stands for an operator set above the highest.

    Raises:
        FileDamagedError: no ONNX file.
    """
    import onnx

    try:
        model = onnx.load(str(file), load_external_data=False)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's errors have no common class
        raise unreadable(Path(file), "ONNX", error) from error
    found: dict[str, int] = {}
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > HIGHEST_OPSET:
            found[f"opset {entry.version}"] = 1
    functions = {(one.domain, one.name) for one in model.functions}
    graphs = [model.graph, *model.functions]
    while graphs:
        for node in graphs.pop().node:
            graphs += [part for attribute in node.attribute for part in (attribute.g, *attribute.graphs) if part.node]
            own = node.domain in ("", "ai.onnx")
            if (own and node.op_type in SUPPORTED) or (node.domain, node.op_type) in functions:
                continue
            name = node.op_type if own else f"{node.domain}::{node.op_type}"
            found[name] = found.get(name, 0) + 1
    return found
