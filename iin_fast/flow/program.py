"""FlowProgram: a flow as data, which one op runs as a whole."""

from dataclasses import dataclass, field
from functools import lru_cache

from . import layers as L
from . import text as _text

__all__ = ["FlowProgram"]


@dataclass(frozen=True, eq=False)
class FlowProgram:
    """A stack of flow layers as immutable, hashable data.

    Parameters are no part of it: layers name them by the index of a tensor and an offset into it, and the tensors are
    given to :func:`iin_fast.ops.flow_program.flow_program` at every call. :class:`iin_fast.flow.ProgramBuilder` makes programs.

    Args:
        dim: number of features, at least 1.
        context: number of features of the context; 0: none.
        tensors: number of parameter tensors, at most 65,536.
        layers: from data to latent.

    Attributes:
        text: the program as one string, the form that the op takes; :meth:`parse` reads it.
        reads: for each layer what it reads from the parameters.
        differentiable: for each tensor whether gradients for it can exist: a mask has none, nor an index, nor a tensor that no layer reads.
        fixed: the tensors that layers read without learning them, masks and indices.

    Raises:
        ValueError: sizes, indices or options that don't fit; the message names the layer by number and kind.

    Example:
        >>> program = FlowProgram.parse("flow 1 2 0 1 2 affine 0 1 0.0 0 0 0 2 permute 1 0")
        >>> program == FlowProgram.parse(program.text)
        True
        >>> print(program)
        flow of 2 features, no context, 2 layers, 1 tensor
        #  layer    sizes                parameters
        0  affine   2: x * s + t, s exp  shift 0[0:2], scale 0[2:4]
        1  permute  1 0
    """

    dim: int
    context: int
    tensors: int
    layers: tuple[L.Layer, ...]
    text: str = field(init=False, repr=False)
    reads: tuple[tuple[L.Read, ...], ...] = field(init=False, repr=False)
    differentiable: tuple[bool, ...] = field(init=False, repr=False)
    fixed: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least, most in (("dim", 1, L.MOST), ("context", 0, L.MOST), ("tensors", 0, L.MOST_TENSORS)):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"FlowProgram: {name} is {value!r}, expected an integer of {least} … {most}")
        reads = []
        for number, layer in enumerate(self.layers):
            try:
                layer.check(self.dim, self.context)
                reads.append(tuple(layer.reads(self.dim, self.context)))
                for read in reads[-1]:
                    self._check_ref(read)
            except ValueError as error:
                raise ValueError(f"FlowProgram: layer {number} ({L.kind(layer)}): {error}") from None
        read_by_layers = [read for layer_reads in reads for read in layer_reads]
        learned = {read.ref.tensor for read in read_by_layers if read.learned}
        self._set("reads", tuple(reads))
        self._set("differentiable", tuple(i in learned for i in range(self.tensors)))
        self._set("fixed", tuple(sorted({read.ref.tensor for read in read_by_layers} - learned)))
        self._set("text", _text.write(self.dim, self.context, self.tensors, self.layers))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_ref(self, read: L.Read) -> None:
        tensor, offset = read.ref
        if not 0 <= tensor < self.tensors:
            raise ValueError(f"{read.name} is in tensor {tensor}, but the program has {self.tensors} tensors")
        if not 0 <= offset < 2**48:
            raise ValueError(f"{read.name} starts at element {offset} of tensor {tensor}, expected 0 … 2^48")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlowProgram) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        from .table import table  # what only a reader needs

        return table(self)

    @staticmethod
    def parse(text: str) -> "FlowProgram":
        """The program of a text.

        Raises:
            ValueError: the text is no program; the message names the layer and the token.
        """
        return _parsed(text)


@lru_cache(maxsize=256)
def _parsed(text: str) -> FlowProgram:
    try:
        program: FlowProgram = _text.parse(text, FlowProgram)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith("FlowProgram: ") else f"FlowProgram: {message}") from None
    return program
