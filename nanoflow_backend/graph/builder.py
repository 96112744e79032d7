"""GraphBuilder turns a layer that is written as calls into a Graph."""

from __future__ import annotations

from dataclasses import replace

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.quantization import BLOCK, FP8, Quantization
from nanoflow_backend.graph.fusion import fuse_quantise
from nanoflow_backend.graph.operation import Graph, Kind, Operation, Parameter, Resource, ScaleOf, Source, Value


class GraphBuilder:
    """Each method appends one operation and returns the names of the values it writes.

    Widths are of one rank out of `tp`. A product whose weight `quantization` covers is preceded by an operation that
    quantises its input, and with `scaled_kv` pages have scales: who writes a layer need not say so.
    """

    def __init__(self, tp: int = 1, quantization: Quantization | None = None, scaled_kv: bool = False) -> None:
        self.tp, self.quantization, self.scaled_kv = tp, quantization, scaled_kv
        self._operations: list[Operation] = []
        self._values: dict[str, Value] = {}
        self._inputs: list[str] = []
        self._parameters: dict[str, Parameter] = {}

    def input(self, name: str, width: int = 1, dtype: str = "activations", kind: Kind = Kind.TOKENS) -> str:
        self._inputs.append(name)
        return self._value(name, width, dtype, kind)

    def batch(self) -> tuple[str, str, str]:
        """positions [T], slots [T] and page_table [slots, pages]: where each token stands and keeps its K and V."""
        return (
            self.input("positions", dtype="int32"),
            self.input("slots", dtype="int32"),
            self.input("page_table", dtype="int32", kind=Kind.BATCH),
        )

    def build(self, *outputs: str) -> Graph:
        graph = Graph(
            tuple(self._operations), self._values, tuple(self._inputs), outputs, tuple(self._parameters.values())
        )
        return fuse_quantise(graph)

    # parameters

    def weight(self, name: str, *sources: Source, interleave: int = 1, matrices: int = 1) -> str:
        """A parameter read from the checkpoint: its sources' shards (see Parameter), stacked as `matrices` of equal
        height."""
        shapes = [local_shape(source, self.tp) for source in sources]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if matrices > 1:
            shape = (matrices, shape[0] // matrices, *shape[1:])
        self._parameters[name] = Parameter(name, shape, sources, interleave)
        return name

    def constant(self, name: str, values: tuple[float, ...]) -> str:
        self._parameters[name] = Parameter(name, (len(values),), dtype="float32", constant=values)
        return name

    def kv_scales(self, *sources: Source) -> tuple[str, ...]:
        """The parameter with the scales of a layer's K and V, if pages have them; `sources` are their projections."""
        if not self.scaled_kv:
            return ()
        self._parameters["kv.scales"] = Parameter("kv.scales", (2,), sources, dtype="float32", scale=ScaleOf.KV)
        return ("kv.scales",)

    # operations

    def embed(self, name: str, token_ids: str, table: str) -> tuple[str, str]:
        """The residual stream starts at zero: the embedding is its first update."""
        width = self._parameters[table].shape[-1]
        outputs = (self._value("residual", width), self._value("update", width))
        self._append(name, "embed", Resource.MEMORY, (token_ids,), outputs, (table,))
        return outputs

    def add_rms_norm(self, name: str, residual: str, update: str, weight: str, eps: float) -> tuple[str, str]:
        """(residual + update, its RMS norm times weight): the two reads of the stream in one pass."""
        width = self._values[residual].width
        outputs = (self._value(f"{name}.residual", width), self._value(name, width))
        self._append(name, "add_rms_norm", Resource.MEMORY, (residual, update), outputs, (weight,), eps=eps)
        return outputs

    def quantise(self, x: str, width: int = 0, static_scale: str | None = None) -> tuple[str, str]:
        """(x in e4m3, its fp32 scales): one for each `width` columns of a row, or for the whole row."""
        quantised = (f"{x}.fp8", f"{x}.scale")
        if quantised[0] not in self._values:
            assert self.quantization is not None
            columns = self._values[x].width
            self._value(quantised[0], columns, FP8)
            self._value(quantised[1], columns // (width or columns), "float32")
            self._append(
                f"{x}_quantise",
                "quantise",
                Resource.MEMORY,
                (x,),
                quantised,
                () if static_scale is None else (static_scale,),
                group=width,
                upper_bound=self.quantization.activation_limit,
            )
        return quantised

    def linear(
        self,
        name: str,
        x: str,
        weight: str,
        bias: str | None = None,
        dtype: str = "activations",
        *,
        quantise: bool = True,
    ) -> str:
        """x weight^T + bias. With `quantise` off the product stays as it is, whatever the quantization says."""
        y = self._value(name, self._parameters[weight].shape[0], dtype)
        biases = () if bias is None else (bias,)
        return self._product(name, "linear", (x,), y, weight, biases, quantise=quantise)

    def linear_swiglu(self, name: str, x: str, weight: str) -> str:
        """silu(gate) * up, of a weight whose rows are gates and ups in turn."""
        y = self._value(name, self._parameters[weight].shape[0] // 2)
        return self._product(name, "linear_swiglu", (x,), y, weight)

    def rope_append(
        self,
        name: str,
        qkv: str,
        batch: tuple[str, str, str],
        frequencies: str,
        kv_heads: int,
        kv_scales: tuple[str, ...] = (),
        norms: tuple[str, ...] = (),
        *,
        head_dim: int,
        eps: float = 0.0,
        attention_factor: float = 1.0,
    ) -> tuple[str, str]:
        """Rotate queries and keys; append K and V to the pages, which is what later tokens depend on.

        `frequencies` are those of the pairs of a head's first dimensions: what has none is not rotated. `norms` are the
        weights of RMS norms of every head of Q and of K, which come before. `attention_factor` scales what is rotated,
        as YaRN asks.
        """
        q = self._value(name, self._values[qkv].width - 2 * kv_heads * head_dim)
        pages = self._value("pages", 2 * kv_heads * head_dim, "kv", Kind.PAGES)
        kernel, attributes = ("norm_rope_append", {"eps": eps}) if norms else ("rope_append", {})
        if attention_factor != 1:
            attributes["attention_factor"] = attention_factor
        parameters = (frequencies, *norms, *kv_scales)
        self._append(name, kernel, Resource.MEMORY, (qkv, *batch), (q, pages), parameters, **attributes)
        return q, pages

    def attention(
        self,
        name: str,
        q: str,
        pages: str,
        batch: tuple[str, str, str],
        kv_scales: tuple[str, ...] = (),
        window: int = 0,
    ) -> str:
        """Causal attention of each token over its request's pages up to its own position, or the last `window` keys."""
        output = self._value(name, self._values[q].width)
        attributes = {"window": window} if window else {}
        return self._append(name, "attention", Resource.MEMORY, (q, pages, *batch), (output,), kv_scales, **attributes)

    def route(self, name: str, logits: str, experts_per_token: int, renormalise: bool = True) -> tuple[str, str]:
        """The chosen experts of each token and their weights: softmax over all, top k, made to sum to 1 if asked."""
        outputs = (
            self._value(f"{name}.experts", experts_per_token, "int32"),
            self._value(f"{name}.weights", experts_per_token, "float32"),
        )
        attributes = {} if renormalise else {"renormalise": False}
        self._append(name, "route", Resource.MEMORY, (logits,), outputs, (), **attributes)
        return outputs

    def grouped_linear_swiglu(self, name: str, x: str, experts: str, weight: str) -> str:
        """linear_swiglu of each token with the matrices of its chosen experts, side by side in its row."""
        y = self._value(name, self._values[experts].width * self._parameters[weight].shape[1] // 2)
        return self._product(name, "grouped_linear_swiglu", (x, experts), y, weight)

    def grouped_combine(self, name: str, x: str, experts: str, weights: str, weight: str) -> str:
        """Each chosen expert's part of the row times its matrix, summed with the router's weights."""
        y = self._value(name, self._parameters[weight].shape[1])
        return self._product(name, "grouped_combine", (x, experts, weights), y, weight)

    def all_reduce(self, name: str, x: str) -> str:
        y = self._value(name, self._values[x].width, self._values[x].dtype)
        return self._append(name, "all_reduce", Resource.NETWORK, (x,), (y,))

    def all_gather(self, name: str, x: str) -> str:
        """The ranks' columns side by side."""
        y = self._value(name, self._values[x].width * self.tp, self._values[x].dtype)
        return self._append(name, "all_gather_columns", Resource.NETWORK, (x,), (y,))

    def _product(
        self,
        name: str,
        kernel: str,
        inputs: tuple[str, ...],
        y: str,
        weight: str,
        biases: tuple[str, ...] = (),
        *,
        quantise: bool = True,
    ) -> str:
        """A product of inputs[0]; the kernel is "scaled_..." where the weight is quantised, and takes scales too."""
        parameters: tuple[str, ...] = (weight,)
        if quantise and self._is_covered(weight):
            x, *others = inputs
            weight_scale, *input_scale = self._quantise_weight(weight)
            kernel, inputs = (
                f"scaled_{kernel}",
                (*self.quantise(x, self._scaled_columns(x, weight), *input_scale), *others),
            )
            parameters = (weight, weight_scale)
        return self._append(name, kernel, Resource.COMPUTE, inputs, (y,), (*parameters, *biases))

    def _scaled_columns(self, x: str, weight: str) -> int:
        """Columns of x that have a scale; 0: all of a row. A row may hold what several experts are to multiply."""
        if self.quantization is not None and self.quantization.activations == "group":
            return BLOCK
        columns = self._parameters[weight].shape[-1]
        return 0 if columns == self._values[x].width else columns

    def _is_covered(self, weight: str) -> bool:
        """Raises: ConfigError, the quantization covers some of the sources and leaves others as they are."""
        if self.quantization is None:
            return False
        tensors = [source.tensor for source in self._parameters[weight].sources]
        covered = [self.quantization.covers(tensor) for tensor in tensors]
        if any(covered) and not all(covered):
            raise ConfigError(
                f"quantization_config: expected all or none of {', '.join(tensors)} to be quantised, for they are "
                f"one product here; {tensors[covered.index(False)]} is left as it is"
            )
        return all(covered) and bool(covered)

    def _quantise_weight(self, weight: str) -> list[str]:
        """Make a parameter e4m3, and make those of its scales: the weight's and, if that one is static, its input's.

        Raises: ConfigError, blocks that are not whole, or that ranks would cut.
        """
        assert self.quantization is not None
        parameter = self._parameters[weight]
        in_blocks = self.quantization.weights == "block"
        run = BLOCK if in_blocks and parameter.interleave > 1 else 1
        for source in parameter.sources if in_blocks else ():
            shape = local_shape(source, self.tp)
            if shape[0] % BLOCK or shape[1] % BLOCK:
                raise ConfigError(
                    f"quantization_config: blocks of {BLOCK}: expected {source.tensor} to have a multiple of that in "
                    f"rows and columns{f' on each of {self.tp} ranks' if self.tp > 1 else ''}, got {list(shape)}"
                )
            if source.paired and BLOCK % (head_dim := source.shape[0] // source.units):
                raise ConfigError(
                    f"quantization_config: blocks of {BLOCK}: expected a divisor of that for head_dim, since "
                    f"{source.tensor} is for a rotation of neighbouring dimensions, got {head_dim}"
                )
        *matrices, rows, columns = parameter.shape
        shape = (rows // BLOCK, columns // BLOCK) if in_blocks else (rows,)
        self._parameters[weight] = replace(parameter, dtype=FP8, run=run)
        scales = [
            replace(parameter, name=f"{weight}.scale", shape=(*matrices, *shape), dtype="float32", scale=ScaleOf.WEIGHT)
        ]
        if self.quantization.activations == "static":
            name = f"{weight}.input_scale"
            scales.append(Parameter(name, (1,), parameter.sources, dtype="float32", scale=ScaleOf.INPUT))
        self._parameters |= {each.name: each for each in scales}
        return [each.name for each in scales]

    def _value(self, name: str, width: int = 1, dtype: str = "activations", kind: Kind = Kind.TOKENS) -> str:
        if name in self._values:
            raise ValueError(f"value {name!r} is written twice")
        self._values[name] = Value(name, width, dtype, kind)
        return name

    def _append(
        self,
        name: str,
        kernel: str,
        resource: Resource,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        parameters: tuple[str, ...] = (),
        **attributes: int | float,
    ) -> str:
        self._operations.append(Operation(name, kernel, resource, inputs, outputs, parameters, attributes))
        return outputs[0]


def local_shape(source: Source, tp: int) -> tuple[int, ...]:
    """The shape of one rank's shard. Units that do not divide evenly are padded with zeros on the last ranks;
    fewer units than ranks (kv heads) are copied, each to tp / units neighbours."""
    if source.shard is None or tp == 1:
        return source.shape
    units = source.units or source.shape[source.shard]
    here = -(-units // tp)
    shape = list(source.shape)
    shape[source.shard] = shape[source.shard] // units * here
    return tuple(shape)
