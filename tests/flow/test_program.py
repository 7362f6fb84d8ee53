"""FlowProgram: its text and back, its table, and the errors for what is no program."""

import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flow.programs import Drawn, programs
from iin_fast.flow import ABSENT, FlowProgram, NetBuilder, ProgramBuilder, Ref, Weights, affine, mlp, spline
from iin_fast.flow.layers import Affine, AffineTransformer, Inverse, Linear, SplineTransformer
from iin_fast.flow.layers import kind as kind_of

SETTINGS = settings(max_examples=60, deadline=None)
REF = Ref(0)


@SETTINGS
@given(programs(batches=(0, 0)))
def test_text_and_back(drawn: Drawn) -> None:
    program = drawn.program
    FlowProgram.parse.__globals__["_parsed"].cache_clear()
    again = FlowProgram.parse(program.text)
    assert again == program and hash(again) == hash(program)
    assert again.text == program.text and again.reads == program.reads
    assert pickle.loads(pickle.dumps(program)) == program


@SETTINGS
@given(programs(batches=(0, 0)))
def test_table_names_every_layer_and_parameter(drawn: Drawn) -> None:
    head, _, *lines = str(drawn.program).splitlines()
    assert f"{drawn.program.dim} feature" in head and f"{drawn.program.tensors} tensor" in head
    starts = [line.split()[0] for line in lines if line[0] != " "]
    assert starts == [str(i) for i in range(len(drawn.program.layers))]
    numbered = [line for line in lines if line[0] != " "]
    for line, layer in zip(numbered, drawn.program.layers, strict=True):
        assert kind_of(layer) in line
    for reads in drawn.program.reads:
        for read in reads:
            assert f" {read.ref.tensor}[{read.ref.offset}:" in str(drawn.program)


def test_table_of_a_small_flow() -> None:
    builder = ProgramBuilder(3, 2)
    weights = [Weights(4, Ref(0), Ref(1)), Weights(4, Ref(2, 8), ABSENT)]
    net = mlp(weights, activation="leaky_relu", slope=0.1, context=True)
    builder.tensors = [torch.empty(0)] * 4
    builder.affine(Ref(3), Ref(3, 3), order="shift_first")
    builder.coupling([0], [2, 1], net, affine(2, "tanh"), inverse=True)
    builder.permute([2, 0, 1])
    assert str(builder.build()) == TABLE


TABLE = """\
flow of 3 features, context 2, 3 layers, 4 tensors
#  layer                  sizes                       parameters
0  affine                 3: s * (x + t), s plain     shift 3[0:3], scale 3[3:6]
1  inverse coupling       2 1 from 0
     v2 = concat          features 1, context 2 -> 3
     v3 = dense           v2 3 -> 4                   weight 0[0:12], bias 1[0:4]
     v4 = leaky_relu 0.1  v3 4 -> 4
     v5 = dense           v4 4 -> 4                   weight 2[8:24]
     affine               v5 4 -> 2: tanh 1
2  permute                2 0 1"""


def program(*layers, dim: int = 3, context: int = 0, tensors: int = 1) -> FlowProgram:
    return FlowProgram(dim, context, tensors, layers)


def build(call, dim: int = 3, context: int = 0) -> FlowProgram:
    builder = ProgramBuilder(dim, context)
    builder.ref(torch.empty(0))
    call(builder)
    return builder.build()


def coupling(net, transformer, conditioning=(0,), transformed=(1, 2), context: int = 0):
    return lambda: build(lambda b: b.coupling(conditioning, transformed, net, transformer), context=context)


def dense(out: int, source: int = 0):
    net = NetBuilder()
    return net.build(net.dense(source, Weights(out, REF)))


def two(step: str):
    """A step of two values of different sizes."""
    net = NetBuilder()
    a, b = net.dense(0, Weights(4, REF)), net.dense(0, Weights(3, REF))
    return net.build(getattr(net, step)(a, b))


BAD = {
    "permutation": (lambda: build(lambda b: b.permute([0, 0, 1])), r"layer 0 \(permute\): index holds 0 more than once"),
    "short permutation": (lambda: build(lambda b: b.permute([0, 1])), r"layer 0 \(permute\): index holds 2 features, expected 3"),
    "feature outside": (lambda: build(lambda b: b.permute([0, 1, 3])), r"layer 0 \(permute\): index holds 3, expected features of 0 … 2"),
    "slope": (lambda: build(lambda b: (b.permute([0, 1, 2]), b.activation(0.0))), r"layer 1 \(activation\): slope is 0.0, expected a number above 0"),
    "overlap": (coupling(dense(4), affine(2, "tanh"), [0, 1]), r"layer 0 \(coupling\): feature 1 conditions and is transformed"),
    "condition outside": (coupling(dense(4), affine(2, "tanh"), [5]), r"conditioning holds 5, expected features of 0 … 2"),
    "nothing transformed": (coupling(dense(4), affine(2, "tanh"), [0], []), r"transformed is empty"),
    "outputs": (coupling(dense(5), affine(2, "tanh")), r"layer 0 \(coupling\): affine transformer: the net has 5 outputs, expected 4: a raw scale and a shift for 2 features"),
    "additive outputs": (coupling(dense(4), affine(2, "none")), r"4 outputs, expected 2: a shift for 2"),
    "spline outputs": (coupling(dense(21), spline(4)), r"spline transformer: the net has 21 outputs, expected 22: 4 widths, 4 heights and 3 derivatives for each of 2"),
    "bins": (coupling(dense(4), SplineTransformer(0, "linear", "nflows", -1, 1, -1, 1, 0, 0, 0)), r"bins is 0, expected 1"),
    "box": (coupling(dense(4), SplineTransformer(4, "linear", "nflows", -1, 2, -1, 1, 0, 0, 0)), r"box is \(-1, 2, -1, 1\), expected the same bound"),
    "wrap": (coupling(dense(22), spline(4, tails="circular", wrap=True)), r"wrap with tails circular, expected linear ones"),
    "narrow bins": (coupling(dense(22), spline(4, min_bin_width=0.3)), r"min_bin_width is 0.3, expected between 0 and 1 / bins"),
    "not finite": (coupling(dense(4), affine(2, "tanh", clamp=float("nan"))), r"clamp is nan, expected a number above 0"),
    "clamp": (coupling(dense(4), affine(2, "softclip", clamp=0)), r"clamp is 0.0, expected a number above 0"),
    "squash": (coupling(dense(4), affine(2, "relu")), r"squash is 'relu', expected one of identity, tanh"),
    "layout": (coupling(dense(4), AffineTransformer("tanh", 1.0, 1.0, 0, 1, 1, 1)), r"a raw value is both scale and shift"),
    "scale outside": (coupling(dense(4), AffineTransformer("tanh", 1.0, 1.0, 0, 4, 1, 1)), r"the scales lie at 0 … 4, expected within 0 … 3"),
    "additive scale": (coupling(dense(2), AffineTransformer("none", 1.0, 1.0, 0, 1, 0, 1)), r"scale_at is 0, expected -1"),
    "undefined value": (coupling(dense(4, source=2), affine(2, "tanh")), r"step 0 \(dense\): value 2 is not defined; values before are 0 … 1"),
    "no context": (coupling(dense(4, source=1), affine(2, "tanh")), r"step 0 \(dense\): value 1 is empty: the program has no context"),
    "nothing conditions": (coupling(dense(4), affine(2, "tanh"), []), r"step 0 \(dense\): value 0 is empty: nothing conditions"),
    "add": (coupling(two("add"), affine(2, "tanh")), r"step 2 \(add\): value 2 has 4 features and value 3 has 3"),
    "glu": (coupling(two("glu"), affine(2, "tanh")), r"step 2 \(glu\): value 2 has 4 features and value 3 has 3"),
    "no outputs": (coupling(NetBuilder().build(), affine(2, "tanh")), r"the net has no outputs"),
    "features as outputs": (coupling(NetBuilder().build(0), affine(2, "tanh")), r"the net gives out value 0, expected one that a step makes"),
    "activation of the net": (coupling(mlp([Weights(4, REF)], last="softmax"), affine(2, "tanh")), r"step 1 \(act\): kind is 'softmax', expected one of none, relu"),
    "tensor outside": (lambda: program(Affine("scale_first", "exp", 0.0, Ref(1), REF)), r"layer 0 \(affine\): shift is in tensor 1, but the program has 1 tensors"),
    "negative offset": (lambda: program(Affine("scale_first", "exp", 0.0, Ref(0, -1), REF)), r"shift starts at element -1 of tensor 0"),
    "form": (lambda: program(Affine("scale_first", "log", 0.0, REF, REF)), r"form is 'log', expected one of plain, exp, softplus"),
    "eps": (lambda: program(Affine("scale_first", "softplus", -1.0, REF, REF)), r"eps is -1.0, expected at least 0"),
    "packed": (lambda: program(Linear("packed", "exp", 0.0, REF)), r"layer 0 \(linear\): upper is absent, which storage packed"),
    "square": (lambda: program(Linear("square", "exp", 0.0, REF, REF)), r"layer 0 \(linear\): upper is there, which storage square"),
    "twice inverse": (lambda: program(Inverse(Inverse(Affine("scale_first", "exp", 0.0, REF)))), r"the inverse of an inverse"),
    "tensors": (lambda: FlowProgram.parse("flow 1 2 0 65537 0"), r"FlowProgram: tensors is 65537, expected an integer of 0 … 65536"),
    "dim": (lambda: program(dim=0), r"FlowProgram: dim is 0, expected an integer of 1"),
    "empty text": (lambda: FlowProgram.parse(""), r"FlowProgram: the text ends after 0 tokens, expected flow"),
    "word": (lambda: FlowProgram.parse("flow 1 2 0 0 1 rotate"), r"layer 0 \(layer\): token 7 is 'rotate', expected affine"),
    "number": (lambda: FlowProgram.parse("flow 1 2 0 0 1 activation nan 1"), r"layer 0 \(activation\): token 8 is 'nan', expected slope, a finite number"),
    "code": (lambda: FlowProgram.parse("flow 1 2 0 1 1 affine 2 0 0.0 0 0 0 2"), r"layer 0 \(affine\): order is 2, expected a code of scale_first, shift_first"),
    "wrapped": (lambda: FlowProgram.parse("flow 1 2 0 0 1 coupling 1 0 1 1 net 0 1 0 wrapped affine"), r"token 17 is 'affine', expected spline"),
    "rest": (lambda: FlowProgram.parse("flow 1 2 0 0 1 permute 1 0 2"), r"1 tokens are left behind the last layer"),
    "count": (lambda: FlowProgram.parse(f"flow 1 2 0 0 {10**17} permute 1 0"), r"n_layers is 100000000000000000, but 3 tokens follow"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_say_where_and_what(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert str(error.value).startswith("FlowProgram: ")


def corrupted(text: str, seed: int) -> str:
    """The text with some tokens dropped, doubled, exchanged or changed."""
    draw = random.Random(seed)
    words = text.split()
    for _ in range(draw.randint(1, 3)):
        i, j = draw.randrange(len(words)), draw.randrange(len(words))
        change = draw.choice(("drop", "double", "exchange", "number", "near", "word"))
        if change == "drop" and len(words) > 1:
            del words[i]
        elif change == "double":
            words.insert(i, words[i])
        elif change == "exchange":
            words[i], words[j] = words[j], words[i]
        elif change == "number":
            words[i] = draw.choice(
                ("-1", "0", "1", "7", "1.5", "-2.0", "1e400", "nan", str(2**24), str(2**40), "9" * 30)
            )
        elif change == "near":
            words[i] = str(int(words[i]) + draw.choice((-1, 1))) if words[i].lstrip("-").isdigit() else words[j]
        else:
            words[i] = draw.choice(("affine", "coupling", "net", "dense", "inverse", "spline", "é", "0x1", "1_0"))
    return " ".join(words)


@settings(max_examples=300, deadline=None)
@given(programs(batches=(0, 0), dims=(1, 6)), st.integers(0, 2**20))
def test_a_corrupted_text_is_refused_or_is_a_program(drawn: Drawn, seed: int) -> None:
    text = corrupted(drawn.program.text, seed)
    try:
        found = FlowProgram.parse(text)
    except ValueError as error:
        assert str(error).startswith("FlowProgram: ")
    else:
        assert FlowProgram.parse(found.text) == found


def test_builder_gives_a_tensor_one_place() -> None:
    builder = ProgramBuilder(2)
    a, b = torch.zeros(4), torch.zeros(2)
    assert [builder.ref(a), builder.ref(b), builder.ref(a, 2), builder.ref(None)] == [(0, 0), (1, 0), (0, 2), ABSENT]
    assert [id(t) for t in builder.tensors] == [id(a), id(b)]


def test_which_tensors_can_have_a_gradient() -> None:
    net = NetBuilder()
    net = net.build(net.dense(0, Weights(2, Ref(0), ABSENT, Ref(1))))
    builder = ProgramBuilder(2)
    builder.tensors = [torch.empty(0)] * 3
    builder.autoregressive(net, affine(2, "none"))
    assert builder.build().differentiable == (True, False, False)
