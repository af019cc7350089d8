"""What the sweep goes through: every class of ``torch.nn``, and functions, with small inputs.

A newcomer adds a row: a class or function, arguments, and the data of one task.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = torch.float64
Spec = tuple[int, ...] | Callable[[torch.Generator], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """``call(layer, *data)``, tensors; the data are those of one task, each task has other ones.

    The first of the data, if it is floating, has a parameter added to it. ``random`` if numbers are
    drawn; ``oracle`` says what a derivative is compared with: what torch alone computes, values of
    the function as hyperfunc has it, or no differences at all, where what torch calls the gradient
    is none. No differences are taken along the rows ``constant`` of parameters.
    """

    name: str
    make: Callable[[], Any]
    data: tuple[Spec, ...]
    call: Callable[..., Any]
    train: bool = True
    random: bool = False
    oracle: str = "torch"
    constant: tuple[tuple[str, int], ...] = ()

    @property
    def layer(self) -> str:
        """The name of the class, or F. and that of the function."""
        return self.name.partition("(")[0]

    @property
    def is_function(self) -> bool:
        return self.make is _nothing


def _nothing() -> None:
    return None


def _plain(layer: Any, *data: Any) -> Any:
    return layer(*data)


def row(
    name: str,
    *args: Any,
    x: tuple[int, ...] | Sequence[Spec],
    options: Sequence[dict[str, Any]] = ({},),
    call: Callable[..., Any] = _plain,
    note: str = "",
    **flags: Any,
) -> list[Case]:
    """The cases of a class, one for each of its options, which may hold flags of a case too."""
    data = (x,) if all(isinstance(size, int) for size in x) else tuple(x)
    kind = getattr(nn, name, None)
    if kind is None:
        return []  # this torch does not have it yet
    cases = []
    for keywords in options:
        own = {key: keywords[key] for key in keywords.keys() & {"train", "oracle", "constant"}}
        rest = {key: value for key, value in keywords.items() if key not in own}
        cases.append(
            Case(
                f"{name}({_label(keywords)}){note and ' ' + note}",
                lambda kind=kind, rest=rest: kind(*args, **rest),
                data,
                call,
                **flags | own,
            )
        )
    return cases


def function(
    name: str,
    *args: Any,
    x: tuple[int, ...] | Sequence[Spec],
    options: Sequence[dict[str, Any]] = ({},),
    before: Callable[..., Any] = lambda *data: data,
    note: str = "",
    **flags: Any,
) -> list[Case]:
    """The cases of a function of ``torch.nn.functional``, called as it is."""
    data = (x,) if all(isinstance(size, int) for size in x) else tuple(x)
    fn = getattr(F, name, None)
    if fn is None:
        return []
    return [
        Case(
            f"F.{name}({_label(keywords)}){note and ' ' + note}",
            _nothing,
            data,
            lambda _, *data, keywords=keywords: fn(*before(*data), *args, **keywords),
            **flags,
        )
        for keywords in options
    ]


def _label(keywords: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={_short(value)}"
        for key, value in keywords.items()
        if key not in ("oracle", "constant")
    )


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return "tensor"
    return str(getattr(value, "__name__", value)).partition("(")[0] or str(value)


def ints(high: int, *shape: int) -> Spec:
    return lambda g: torch.randint(0, high, shape, generator=g)


def signs(*shape: int) -> Spec:
    return lambda g: torch.randint(0, 2, shape, generator=g).to(D) * 2 - 1


def many_labels(g: torch.Generator) -> Tensor:
    rows = [torch.randperm(4, generator=g) for _ in range(3)]
    return torch.stack([torch.cat([row[:2], torch.tensor([-1, 0])]) for row in rows])


def lengths(*values: int) -> Spec:
    return lambda g: torch.tensor(values)[torch.randperm(len(values), generator=g)]


def weights(n: int = 4) -> Tensor:
    return torch.linspace(0.5, 1.5, n, dtype=D)


def _probabilities(layer: Any, x: Tensor, *rest: Tensor) -> Any:
    return layer(x.sigmoid(), *rest)


def _start(layer: Any, x: Tensor, *state: Tensor) -> Any:
    """A recurrent layer from no state, and from one that is given."""
    y, end = layer(x)
    return layer(y[..., : x.shape[-1]] + x, end)[0]


def _cell(layer: Any, x: Tensor) -> Any:
    return layer(x[1], layer(x[0]))


def _packed(layer: Any, x: Tensor, *ends: Tensor) -> Any:
    sizes = ends[0] if ends else torch.tensor([2, 3])
    packed = nn.utils.rnn.pack_padded_sequence(x, sizes, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(layer(packed)[0])[0]


def _attend(layer: Any, x: Tensor) -> Any:
    return layer(x, x, x)


def _attend_masked(layer: Any, x: Tensor) -> Any:
    hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
    hidden[0, -1] = True
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return layer(x, x, x, key_padding_mask=hidden, attn_mask=causal, need_weights=False)


def _encode_masked(layer: Any, x: Tensor) -> Any:
    hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
    hidden[0, -1] = True
    return layer(x, src_key_padding_mask=hidden)[:, :-1]


def _unpool(pool: Any) -> Callable[..., Any]:
    def call(layer: Any, x: Tensor) -> Any:
        y, places = pool(x, 2, return_indices=True)
        return layer(y, places)

    return call


def _ctc(layer: Any, x: Tensor, targets: Tensor, *ends: Tensor) -> Any:
    ends = ends or (torch.tensor([5, 4]), torch.tensor([2, 1]))
    return layer(x.log_softmax(-1), targets, *ends)


def _ctc_joined(layer: Any, x: Tensor, targets: Tensor, *ends: Tensor) -> Any:
    return _ctc(layer, x, targets.flatten()[:3], *ends)


def _fuzzy(fn: str) -> Any:
    return lambda layer, x, *rest: layer(getattr(x, fn)(-1), *(r.softmax(-1) for r in rest))


REDUCTIONS = ({}, {"reduction": "sum"}, {"reduction": "none"})
IMAGE = (1, 2, 4, 4)
VOLUME = (1, 2, 2, 3, 3)
LINE = (2, 2, 5)
SIZES = {1: LINE, 2: IMAGE, 3: VOLUME}
WORDS = (2, 3, 4)


def each_dim(name: str, *args: Any, **keywords: Any) -> list[Case]:
    return [c for d in (1, 2, 3) for c in row(f"{name}{d}d", *args, x=SIZES[d], **keywords)]


CASES: list[Case] = [
    # activations
    *(
        case
        for name in (
            *("ELU", "GLU", "Hardsigmoid", "Hardswish", "Hardtanh", "Hardshrink", "LeakyReLU"),
            *("LogSigmoid", "Mish", "PReLU", "ReLU", "ReLU6", "RReLU", "SELU", "SiLU", "Sigmoid"),
            *("Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink"),
        )
        for case in row(name, x=(3, 4), random=name == "RReLU")
    ),
    *row("RReLU", x=(3, 4), options=({"train": False},)),
    *row("CELU", 0.7, x=(3, 4)),
    *row("PReLU", x=(3, 4), options=({"num_parameters": 4},)),
    *row("GELU", x=(3, 4), options=({}, {"approximate": "tanh"})),
    *row("Threshold", 0.1, 0.2, x=(3, 4)),
    *(c for n in ("ReLU", "Hardswish", "Hardsigmoid", "SiLU", "Mish", "ELU", "RReLU", "Hardtanh")
      for c in row(n, x=(3, 4), random=n == "RReLU", options=({"inplace": True},),
                   call=lambda layer, x: layer(x.clone()))),
    *(c for n in ("Softmax", "LogSoftmax", "Softmin") for c in row(n, -1, x=(3, 4))),
    *row("Softmax2d", x=IMAGE),
    # layers without options that matter to derivatives
    *row("Linear", 4, 3, x=(3, 4), options=({}, {"bias": False})),
    *row("Bilinear", 4, 3, 2, x=((3, 4), (3, 3))),
    *row("Identity", x=(3, 4)),
    *row("Flatten", x=IMAGE),
    *row("Unflatten", 1, (2, 2), x=(3, 4)),
    *row("ChannelShuffle", 2, x=(1, 4, 2, 2)),
    *row("PixelShuffle", 2, x=(1, 4, 2, 2)),
    *row("PixelUnshuffle", 2, x=IMAGE),
    *row("Unfold", 2, x=IMAGE, options=({}, {"stride": 2, "padding": 1, "dilation": 2})),
    *row("Fold", (3, 3), 2, x=(1, 8, 4)),
    *row("CosineSimilarity", x=((3, 4), (3, 4))),
    *row("PairwiseDistance", x=((3, 4), (3, 4)), options=({}, {"p": 1.0}, {"keepdim": True})),
    *row("Sequential", nn.Linear(4, 3), nn.Tanh(), x=(3, 4)),
    *row("ModuleList", [nn.Linear(4, 3)], x=(3, 4), call=lambda m, x: m[0](x)),
    *row("ModuleDict", {"a": nn.Linear(4, 3)}, x=(3, 4), call=lambda m, x: m["a"](x)),
    *row("ParameterList", [torch.ones(4)], x=(3, 4), call=lambda m, x: x.sin() * m[0]),
    *row("ParameterDict", {"a": torch.ones(4)}, x=(3, 4), call=lambda m, x: x.sin() * m["a"]),
    # dropout
    *(c for n in ("Dropout", "AlphaDropout", "FeatureAlphaDropout")
      for c in row(n, 0.4, x=LINE, random=True, options=({}, {"train": False}))),
    *each_dim("Dropout", 0.4, random=True),
    *row("Dropout", 0.4, x=LINE, random=True, options=({"inplace": True},),
         call=lambda layer, x: layer(x.clone())),
    # pooling and resampling
    *each_dim("AdaptiveAvgPool", 2),
    *each_dim("AdaptiveMaxPool", 2, options=({}, {"return_indices": True})),
    *each_dim("AvgPool", 2, options=({}, {"stride": 1, "padding": 1, "ceil_mode": True})),
    *row("AvgPool2d", 2, x=IMAGE, options=({"count_include_pad": False, "padding": 1},
                                          {"divisor_override": 3})),
    *each_dim("MaxPool", 2, options=({}, {"stride": 1, "padding": 1, "dilation": 2},
                                     {"return_indices": True})),
    *each_dim("LPPool", 2.0, 2),
    *row("FractionalMaxPool2d", 2, x=IMAGE, random=True,
         options=({"output_size": 2}, {"output_ratio": 0.7},
                  {"output_size": 2, "return_indices": True})),
    *row("FractionalMaxPool3d", 2, x=(1, 2, 4, 4, 4), random=True, options=({"output_size": 2},)),
    *(c for d, pool in ((1, F.max_pool1d), (2, F.max_pool2d), (3, F.max_pool3d))
      for c in row(f"MaxUnpool{d}d", 2, x=(1, 2, *[4] * d), call=_unpool(pool))),
    *row("Upsample", x=LINE, note="line", options=(
        {"scale_factor": 2}, {"scale_factor": 2, "mode": "linear"})),
    *row("Upsample", x=IMAGE, note="image", options=tuple(
        {"scale_factor": 2, "mode": mode} for mode in ("nearest", "bilinear", "bicubic"))),
    *row("Upsample", x=VOLUME, note="volume", options=(
        {"scale_factor": 2, "mode": "trilinear", "align_corners": True}, {"scale_factor": 2})),
    *row("UpsamplingBilinear2d", x=IMAGE, options=({"scale_factor": 2},)),
    *row("UpsamplingNearest2d", x=IMAGE, options=({"scale_factor": 2},)),
    # padding
    *(c for n in ("CircularPad", "ReflectionPad", "ReplicationPad", "ZeroPad")
      for c in each_dim(n, 1)),
    *each_dim("ConstantPad", 1, 0.3),
    # convolution
    *each_dim("Conv", 2, 2, 2, options=(
        {}, {"padding": 1, "stride": 2, "groups": 2, "bias": False},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": 1, "dilation": 2, "padding_mode": "replicate"})),
    *each_dim("ConvTranspose", 2, 2, 2, options=(
        {}, {"padding": 1, "stride": 2, "output_padding": 1, "groups": 2, "bias": False})),
    # normalisation
    *(c for d in (1, 2, 3) for n in ("BatchNorm", "InstanceNorm")
      for c in row(f"{n}{d}d", 2, x=(3, 2, *[2] * d), options=(
          {"affine": True}, {"affine": False}, {"track_running_stats": False},
          {"track_running_stats": True, "train": False}))),
    *row("BatchNorm1d", 4, x=(5, 4), options=({"momentum": None},)),
    *row("SyncBatchNorm", 4, x=(5, 4), options=({}, {"train": False})),
    *row("GroupNorm", 2, 4, x=(2, 4, 3), options=({}, {"affine": False})),
    *row("LayerNorm", 4, x=(3, 4), options=({}, {"bias": False}, {"elementwise_affine": False})),
    *row("LayerNorm", (3, 4), x=(2, 3, 4), note="two dimensions"),
    *row("RMSNorm", 4, x=(3, 4), options=({}, {"elementwise_affine": False, "eps": 1e-3})),
    *row("LocalResponseNorm", 2, x=IMAGE),
    *row("CrossMapLRN2d", 2, x=IMAGE),
    # embeddings
    *row("Embedding", 5, 3, x=(ints(5, 2, 4),), options=(
        {}, {"padding_idx": 0, "constant": (("weight", 0),)}, {"sparse": True},
        {"max_norm": 1.0, "oracle": "ours"},
        {"scale_grad_by_freq": True, "oracle": "none"})),
    *row("EmbeddingBag", 5, 3, x=(ints(5, 2, 4),), options=(
        {}, {"mode": "sum"}, {"mode": "max"}, {"padding_idx": 0},
        {"sparse": True}, {"max_norm": 1.0, "oracle": "ours"},
        {"scale_grad_by_freq": True, "mode": "sum", "oracle": "none"})),
    *row("EmbeddingBag", 5, 3, x=(ints(5, 6), (6,)), options=({"mode": "sum"},),
         note="of weights, by offsets",
         call=lambda layer, i, w: layer(i, torch.tensor([0, 2, 2]), w)),
    *row("EmbeddingBag", 5, 3, x=(ints(5, 6), lengths(0, 2, 4)), options=({"mode": "mean"},),
         note="by mapped offsets", call=lambda layer, i, at: layer(i, at.sort().values)),
    # recurrence
    *(c for n in ("RNN", "GRU", "LSTM") for c in row(
        n, 2, 2, x=(2, 1, 2), call=_start, options=(
            {}, {"batch_first": True, "bias": False},
            {"num_layers": 2, "bidirectional": True}))),
    *row("RNN", 2, 2, x=(2, 1, 2), call=_start, options=({"nonlinearity": "relu"},)),
    *row("LSTM", 2, 3, x=(2, 1, 2), call=_start, options=({"proj_size": 2},)),
    *row("GRU", 2, 2, x=(2, 1, 2), call=_start, random=True,
         options=({"num_layers": 2, "dropout": 0.4},)),
    *(c for n in ("RNN", "GRU", "LSTM")
      for c in row(n, 2, 2, x=(3, 2, 2), call=_packed, note="packed")),
    *row("GRU", 2, 2, x=((3, 2, 2), lengths(2, 3)), call=_packed, note="packed, mapped lengths"),
    *(c for n in ("RNNCell", "GRUCell", "LSTMCell") for c in row(
        n, 2, 2, x=(2, 3, 2), call=_cell, options=({}, {"bias": False}))),
    # attention
    *row("MultiheadAttention", 4, 2, x=WORDS, call=_attend, options=(
        {"batch_first": True}, {"batch_first": True, "train": False},
        {"bias": False, "add_zero_attn": True}, {"kdim": 4, "vdim": 4, "add_bias_kv": True})),
    *row("MultiheadAttention", 4, 2, x=WORDS, call=_attend_masked, note="masked",
         options=({"batch_first": True}, {"batch_first": True, "train": False})),
    *row("MultiheadAttention", 4, 2, x=WORDS, call=_attend_masked, note="masked", random=True,
         options=({"batch_first": True, "dropout": 0.4},)),
    *row("TransformerEncoderLayer", 4, 2, 3, x=WORDS, random=True, options=(
        {"batch_first": True}, {"batch_first": True, "train": False},
        {"batch_first": True, "dropout": 0.0, "norm_first": True, "activation": F.gelu})),
    # without dropout: which entries one seed drops depends on the layout in memory, and that of a
    # decoder is another one under a transform
    *row("TransformerDecoderLayer", 4, 2, 3, 0.0, x=(WORDS, WORDS), options=(
        {"batch_first": True}, {"batch_first": True, "train": False})),
    *row("TransformerEncoder", nn.TransformerEncoderLayer(4, 2, 3, 0.0, F.gelu, batch_first=True),
         1, x=WORDS, call=_encode_masked, options=({"train": True}, {"train": False})),
    *row("TransformerDecoder", nn.TransformerDecoderLayer(4, 2, 3, 0.0, F.gelu, batch_first=True),
         1, x=(WORDS, WORDS), options=({}, {"train": False})),
    *row("Transformer", 4, 2, 1, 1, 3, 0.0, F.gelu, x=(WORDS, WORDS), options=(
        {"batch_first": True}, {"batch_first": True, "train": False})),
    # losses
    *(c for n in ("L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss", "PoissonNLLLoss")
      for c in row(n, x=((3, 4), (3, 4)), options=REDUCTIONS)),
    *row("SmoothL1Loss", x=((3, 4), (3, 4)), options=({"beta": 0.3},)),
    *row("HuberLoss", x=((3, 4), (3, 4)), options=({"delta": 0.3},)),
    *row("PoissonNLLLoss", x=((3, 4), (3, 4)), options=({"full": True},),
         call=lambda layer, x, y: layer(x, y.exp() + 1)),
    *row("GaussianNLLLoss", x=((3, 4), (3, 4), (3, 4)), options=(*REDUCTIONS, {"full": True}),
         call=lambda layer, x, y, v: layer(x, y, v.exp())),
    *(c for n in ("SoftMarginLoss", "HingeEmbeddingLoss", "MultiLabelSoftMarginLoss")
      for c in row(n, x=((3, 4), signs(3, 4)), options=REDUCTIONS)),
    *row("MultiLabelSoftMarginLoss", x=((3, 4), ints(2, 3, 4)), options=({"weight": weights()},)),
    *(c for n, call in (("BCELoss", _probabilities), ("BCEWithLogitsLoss", _plain))
      for c in row(n, x=((3, 4), lambda g: torch.rand(3, 4, generator=g, dtype=D)), call=call,
                   options=(*REDUCTIONS, {"weight": weights()}))),
    *row("BCEWithLogitsLoss", x=((3, 4), (3, 4)), options=({"pos_weight": weights()},)),
    *(c for n in ("CrossEntropyLoss", "NLLLoss", "MultiMarginLoss")
      for c in row(n, x=((3, 4), ints(4, 3)), options=(*REDUCTIONS, {"weight": weights()}))),
    *(c for n in ("CrossEntropyLoss", "NLLLoss")
      for c in row(n, x=((2, 4, 3), ints(4, 2, 3)), note="line", options=(
          *REDUCTIONS, {"weight": weights(), "ignore_index": 1}))),
    *row("CrossEntropyLoss", x=((3, 4), ints(4, 3)), options=({"label_smoothing": 0.1},)),
    *row("CrossEntropyLoss", x=((3, 4), (3, 4)), note="probabilities",
         call=lambda layer, x, y: layer(x, y.softmax(1))),
    *row("NLLLoss2d", x=((1, 4, 2, 2), ints(4, 1, 2, 2))),
    *row("MultiMarginLoss", x=((3, 4), ints(4, 3)), options=({"p": 2, "margin": 0.7},)),
    *row("MultiLabelMarginLoss", x=((3, 4), many_labels), options=REDUCTIONS),
    *row("KLDivLoss", x=((3, 4), (3, 4)), call=_fuzzy("log_softmax"), options=(
        {"reduction": "batchmean"}, {"reduction": "sum"}, {"reduction": "none"})),
    *row("KLDivLoss", x=((3, 4), (3, 4)), options=({"reduction": "sum", "log_target": True},)),
    *row("CosineEmbeddingLoss", x=((3, 4), (3, 4), signs(3)), options=REDUCTIONS),
    *row("MarginRankingLoss", x=((3, 4), (3, 4), signs(3, 4)), options=REDUCTIONS),
    *row("TripletMarginLoss", x=((3, 4),) * 3, options=(*REDUCTIONS, {"swap": True, "p": 3})),
    *row("TripletMarginWithDistanceLoss", x=((3, 4),) * 3, options=(*REDUCTIONS, {"swap": True})),
    *row("CTCLoss", x=((5, 2, 4), ints(3, 2, 2)), call=_ctc, options=({"blank": 3}, {
        "blank": 3, "reduction": "none", "zero_infinity": True})),
    *row("CTCLoss", x=((5, 2, 4), ints(3, 2, 2)), call=_ctc_joined,
         note="joined targets", options=({"blank": 3},)),
    *row("CTCLoss", x=((5, 2, 4), ints(3, 2, 2), lengths(5, 4), lengths(2, 1)), call=_ctc_joined,
         note="joined targets, mapped lengths", options=({"blank": 3},)),
    *row("CTCLoss", x=((5, 2, 4), ints(3, 2, 2), lengths(5, 4), lengths(2, 1)), call=_ctc,
         note="mapped lengths",
         options=({"blank": 3},)),
    *row("AdaptiveLogSoftmaxWithLoss", 4, 5, [2], x=((3, 4), ints(5, 3)),
         call=lambda layer, x, y: layer(x, y).output),
    *row("AdaptiveLogSoftmaxWithLoss", 4, 5, [2], x=(3, 4), options=({"head_bias": True},),
         call=lambda layer, x: layer.log_prob(x)),
    *row("LinearCrossEntropyLoss", 4, 5, x=((3, 4), ints(5, 3)), options=({}, {"bias": True})),
    *(row("LinearCrossEntropyLoss", 4, 5, x=((3, 4), ints(5, 3)), options=(
        {"options": nn.LinearCrossEntropyOptions()},))
      if hasattr(nn, "LinearCrossEntropyOptions") else ()),
    # functions with a loss or a normalisation in their name
    *function("batch_norm", None, None, x=(5, 4), options=({"training": True},)),
    *function("instance_norm", x=(2, 4, 3)),
    *function("layer_norm", (4,), x=(3, 4), options=({}, {"weight": weights(), "bias": weights()})),
    *function("rms_norm", (4,), x=(3, 4), options=({}, {"weight": weights()})),
    *function("group_norm", 2, x=(2, 4, 3)),
    *function("local_response_norm", 2, x=IMAGE),
    *function("normalize", x=(3, 4), options=({}, {"p": 3.0, "dim": 0})),
    *(c for n in ("l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss", "poisson_nll_loss")
      for c in function(n, x=((3, 4), (3, 4)))),
    *function("mse_loss", x=((3, 4), (3, 4)), options=({"weight": weights(12).reshape(3, 4)},)),
    *function("gaussian_nll_loss", x=((3, 4),) * 3, before=lambda x, y, v: (x, y, v.exp())),
    *(c for n in ("soft_margin_loss", "hinge_embedding_loss", "multilabel_soft_margin_loss")
      for c in function(n, x=((3, 4), signs(3, 4)))),
    *function("binary_cross_entropy", x=((3, 4), (3, 4)),
              before=lambda x, y: (x.sigmoid(), y.sigmoid())),
    *function("binary_cross_entropy_with_logits", x=((3, 4), (3, 4))),
    *(c for n in ("cross_entropy", "nll_loss", "multi_margin_loss")
      for c in function(n, x=((3, 4), ints(4, 3)))),
    *function("cross_entropy", x=((2, 4, 3), ints(4, 2, 3)), note="line"),
    *function("multilabel_margin_loss", x=((3, 4), many_labels)),
    *function("kl_div", x=((3, 4), (3, 4)),
              before=lambda x, y: (x.log_softmax(1), y.log_softmax(1)),
              options=({"reduction": "sum", "log_target": True},)),
    *function("cosine_embedding_loss", x=((3, 4), (3, 4), signs(3))),
    *function("margin_ranking_loss", x=((3, 4), (3, 4), signs(3, 4))),
    *function("triplet_margin_loss", x=((3, 4),) * 3),
    *function("triplet_margin_with_distance_loss", x=((3, 4),) * 3),
    *function("ctc_loss", torch.tensor([5, 4]), torch.tensor([2, 1]), x=((5, 2, 4), ints(3, 2, 2)),
              before=lambda x, t: (x.log_softmax(-1), t), options=({"blank": 3},)),
    *function("linear_cross_entropy", x=((3, 4), (5, 4), ints(5, 3))),
    # and functions of another kind that no class stands for
    *function("scaled_dot_product_attention", x=((1, 2, 3, 4),) * 3,
              options=({}, {"is_causal": True})),
    *function("pdist", x=(4, 3)),
    *function("gumbel_softmax", x=(3, 4), random=True),
    *function("gumbel_softmax", x=(3, 4), random=True, oracle="none", options=({"hard": True},)),
    *function("grid_sample", x=((1, 2, 4, 4), (1, 3, 3, 2)), options=(
        {"align_corners": False}, {"align_corners": True, "mode": "bicubic"}),
        before=lambda x, grid: (x, grid.tanh())),
    *function("grid_sample", note="of a grid", x=((1, 3, 3, 2), (1, 2, 4, 4)),
        options=({"align_corners": False},), before=lambda grid, x: (x, grid.tanh())),
    *function("affine_grid", (1, 2, 3, 3), x=(1, 2, 3), options=({"align_corners": False},)),
    *function("multi_margin_loss", x=((3, 4), ints(4, 3)), options=({"p": 2},)),
]  # fmt: skip

LEFT_OUT = {
    "Module": "the base of all classes",
    "Container": "an old name of Module, which says so when it is made",
    "RNNBase": "the base of RNN, LSTM and GRU",
    "RNNCellBase": "the base of the cells",
    "LinearCrossEntropyOptions": "settings, and no module",
    **{
        name: f"is a {name[4:]} after its first call, and refused by name before"
        for name in torch.nn.modules.__all__
        if name.startswith("Lazy")
    },
}
"""Classes that the sweep has no row for, and why."""

_MAPPED = ("vmap", "task_map", "grad of vmap", "backward of vmap")
REFUSED = {
    "RReLU(": (*_MAPPED, "jvp"),
    "GRU() packed, mapped lengths": _MAPPED,
    "CTCLoss(blank=3) joined targets, mapped lengths": _MAPPED,
    "AdaptiveLogSoftmaxWithLoss()": _MAPPED,
    "CrossMapLRN2d(": ("one by one", *_MAPPED, "jvp", "derivative", "compile"),
    "EmbeddingBag(": ("compile",),  # of which inductor makes other numbers
    "F.grid_sample(": ("jvp",),
}
"""What some routes refuse, with advice, by beginnings of names; compiling, also what is random."""


def modules_swept() -> set[str]:
    return {case.layer for case in CASES if not case.is_function}


def functions_swept() -> set[str]:
    return {case.layer.removeprefix("F.") for case in CASES if case.is_function}


def functions_named() -> set[str]:
    """The functions with a loss or a normalisation in their name."""
    return {
        name
        for name, value in vars(F).items()
        if callable(value)
        and not name.startswith("_")
        and re.search("loss|norm|entropy|nll|kl_div", name)
    }
