"""One of our ONNX graphs in half precision, where that costs little accuracy.

The backbone, the projections and the decoder's matrices are computed and stored in float16.
Normalisation, position encodings, sampling locations, heads, decoding and sums over whole maps stay
in float32: half precision has three digits, too few for boxes. This matches autocast in training,
except that the residual path is halved as well.
"""

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

# Parts of module names whose nodes are halved, exceptions to them, and exceptions to those.
HALF_PARTS = (
    *(".blocks.", ".serial_blocks.", ".patch_embed", ".downsample", ".det_exp"),
    *("model.input_proj", "model.tgt_proj", "decoder.layers."),
)
EXACT_PARTS = (".cross_attn",)
HALF_AFTER_ALL = (".value_proj", ".output_proj")
# Operations that need float32 inputs, set their own type, or sum over maps.
EXACT_OPERATIONS = {"Cast", "Constant", "ConstantOfShape", "Resize", "InstanceNormalization"}
EXACT_OPERATIONS |= {"CumSum", "GridSample", "Range", "RandomNormalLike"}
SUFFIX = "__half"


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in half precision; inputs and outputs keep their types. The graph's values must have
    unique names, and its nodes the `namespace` of torch's exporter.
    """
    halving = _Halving(model)
    for node in model.graph.node:
        halving.take(node)
    for output in model.graph.output:
        halving.need(output.name)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for field in ("node", "initializer", "value_info"):
        graph.ClearField(field)
    graph.node.extend(halving.nodes)
    used = {name for node in halving.nodes for name in node.input}
    tensors = [*model.graph.initializer, *halving.initializers]
    graph.initializer.extend(tensor for tensor in tensors if tensor.name in used)
    return result


class _Halving:
    """Collects the new nodes. A value exists under its own name in its own type, under its name
    with SUFFIX in float16, or both.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = onnx.shape_inference.infer_shapes(model).graph
        values = (*graph.input, *graph.value_info, *graph.output)
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        self.floats = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.known = {value.name for value in model.graph.input} | set(self.tensors)
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def take(self, node: NodeProto) -> None:
        """Appends the node in its precision, after the casts that it needs."""
        half = _is_half(node)
        taken = NodeProto()
        taken.CopyFrom(node)
        for names in (taken.input, taken.output):
            for position, name in enumerate(names):
                if half and name in self.floats:
                    names[position] = name + SUFFIX
        for name in taken.input:
            self.need(name)
        self.nodes.append(taken)
        self.known.update(taken.output)

    def need(self, name: str) -> None:
        """Adds the cast that provides a value under this name, if it does not exist yet."""
        if not name or name in self.known:
            return
        own = name.removesuffix(SUFFIX)
        if own == name:
            self._cast(name + SUFFIX, name, TensorProto.FLOAT)
        elif own in self.tensors:
            values = numpy_helper.to_array(self.tensors[own]).astype(np.float16)
            self.initializers.append(numpy_helper.from_array(values, name))
        else:
            self._cast(own, name, TensorProto.FLOAT16)
        self.known.add(name)

    def _cast(self, source: str, target: str, kind: int) -> None:
        self.nodes.append(
            helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=kind)
        )


def _is_half(node: NodeProto) -> bool:
    entries = {entry.key: entry.value for entry in node.metadata_props}
    where = entries.get("namespace", "")

    def inside(parts: tuple[str, ...]) -> bool:
        return any(part in where for part in parts)

    if node.op_type in EXACT_OPERATIONS or not inside(HALF_PARTS):
        return False
    return not inside(EXACT_PARTS) or inside(HALF_AFTER_ALL)
