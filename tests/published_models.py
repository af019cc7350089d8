"""Models of transformers and peft with small random configurations: one row of a table each.

Nothing is downloaded. The libraries come with the extra ``models`` and are imported when a model is
made, so that the table can be read without them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

Tree = Any
Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Size:
    width: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    batch: int

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """What most configurations call by these names."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.length,
            "bos_token_id": None,
            "eos_token_id": None,
        }


TINY = Size(width=8, layers=1, heads=2, vocabulary=13, length=6, batch=2)
SMALL = Size(width=128, layers=2, heads=4, vocabulary=500, length=32, batch=4)


def unchanged(net: Any) -> nn.Module:
    assert isinstance(net, nn.Module)
    return net


@dataclasses.dataclass(frozen=True)
class Model:
    """``build(size, **config)`` makes the module, ``sample(size, generator)`` a batch for it.

    ``in_float64`` is what the configuration needs where torch has no such operation in float64.
    ``change`` makes what is tested of the module, with the same values.
    """

    name: str
    build: Callable[..., nn.Module]
    sample: Callable[[Size, torch.Generator], Batch]
    in_float64: dict[str, Any] = dataclasses.field(default_factory=dict)
    change: Callable[[Any], nn.Module] = unchanged


def transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def gpt2(size: Size, **config: Any) -> nn.Module:
    t = transformers()
    config |= {"n_embd": size.width, "n_layer": size.layers, "n_head": size.heads}
    config |= {"n_positions": size.length, "vocab_size": size.vocabulary}
    config |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    config |= {"bos_token_id": None, "eos_token_id": None}
    return t.GPT2LMHeadModel(t.GPT2Config(**config)).eval()


def bert(size: Size, **config: Any) -> nn.Module:
    t = transformers()
    return t.BertForSequenceClassification(
        t.BertConfig(**size.config, num_labels=3, **config)
    ).eval()


def llama(size: Size, **config: Any) -> nn.Module:
    t = transformers()
    return t.LlamaForCausalLM(t.LlamaConfig(**size.config, num_key_value_heads=1, **config)).eval()


def mixtral(size: Size, **config: Any) -> nn.Module:
    t = transformers()
    config |= {"num_key_value_heads": 1, "num_local_experts": 3, "output_router_logits": True}
    return t.MixtralForCausalLM(t.MixtralConfig(**size.config, **config)).eval()


def t5(size: Size, **config: Any) -> nn.Module:
    t = transformers()
    config |= {"d_model": size.width, "d_kv": size.width // size.heads, "d_ff": 2 * size.width}
    config |= {"num_layers": size.layers, "num_heads": size.heads, "vocab_size": size.vocabulary}
    config |= {"feed_forward_proj": "gated-gelu"}  # smooth, as that of its later releases
    return t.T5ForConditionalGeneration(t.T5Config(decoder_start_token_id=0, **config)).eval()


def vit(size: Size, **config: Any) -> nn.Module:
    t = transformers()
    config |= {key: value for key, value in size.config.items() if key.endswith(("layers", "size"))}
    config |= {"num_attention_heads": size.heads, "num_labels": 3}
    return t.ViTForImageClassification(t.ViTConfig(image_size=8, patch_size=4, **config)).eval()


def whisper(size: Size, **config: Any) -> nn.Module:
    t = transformers()
    for side in ("encoder", "decoder"):
        config |= {f"{side}_layers": size.layers, f"{side}_attention_heads": size.heads}
        config |= {f"{side}_ffn_dim": 2 * size.width}
    config |= {"vocab_size": size.vocabulary, "d_model": size.width, "num_mel_bins": 4}
    config |= {"max_source_positions": size.length, "max_target_positions": size.length}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    return t.WhisperForConditionalGeneration(t.WhisperConfig(**special, **config)).eval()


def lora(size: Size, **config: Any) -> nn.Module:
    import peft

    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    return peft.get_peft_model(llama(size, **config), adapter)


def checkpointed(model: Any) -> nn.Module:
    """The model, with layers that are computed again in the backward pass of training."""
    model.config.use_cache = False
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()
    assert isinstance(model, nn.Module)
    return model.train()


def words(size: Size, generator: torch.Generator) -> Batch:
    ids = torch.randint(1, size.vocabulary, (size.batch, size.length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def padded(size: Size, generator: torch.Generator) -> Batch:
    """Words, of which the last ones are padding."""
    batch = words(size, generator)
    lengths = torch.randint(2, size.length, (size.batch, 1), generator=generator)
    mask = torch.arange(size.length) < lengths
    labels = torch.where(mask, batch["labels"], -100)
    return {**batch, "attention_mask": mask.long(), "labels": labels}


def labelled(size: Size, generator: torch.Generator) -> Batch:
    return {**padded(size, generator), **classes(size, generator)}


def images(size: Size, generator: torch.Generator) -> Batch:
    pixels = torch.randn(size.batch, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, **classes(size, generator)}


def sound(size: Size, generator: torch.Generator) -> Batch:
    shape = (size.batch, 4, 2 * size.length)
    features = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"input_features": features, "labels": words(size, generator)["labels"]}


def classes(size: Size, generator: torch.Generator) -> Batch:
    return {"labels": torch.randint(0, 3, (size.batch,), generator=generator)}


MODELS = (
    Model("GPT-2", gpt2, words),
    Model("GPT-2, checkpointed layers", gpt2, words, change=checkpointed),
    Model("BERT, padding mask", bert, labelled),
    Model("Llama", llama, words),
    Model("Llama, padding mask", llama, padded),
    Model("Llama, LoRA by peft", lora, words),
    Model("Llama, LoRA, checkpointed layers", lora, words, change=checkpointed),
    Model("T5, padding mask", t5, padded),
    Model("Mixtral", mixtral, words, {"experts_implementation": "batched_mm"}),
    Model("ViT", vit, images),
    Model("Whisper", whisper, sound),
)


def module(model: Model, size: Size, dtype: torch.dtype, **config: Any) -> nn.Module:
    """The model, unchanged, with larger weights than those that training starts from."""
    torch.manual_seed(0)
    if dtype == torch.float64:
        config |= model.in_float64
    net = model.build(size, **config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(parameter.ndim == 1).add_(noise, alpha=size.width**-0.5)
    return InFloat64(net) if dtype == torch.float64 else net


def tasks(model: Model, size: Size, number: int, dtype: torch.dtype) -> list[dict[str, Batch]]:
    """What to fit and what to be judged by, for each task."""
    generator = torch.Generator().manual_seed(2)
    drawn = [{k: model.sample(size, generator) for k in ("fit", "judge")} for _ in range(number)]
    floating = lambda t: t.to(dtype) if t.is_floating_point() else t  # noqa: E731
    return [optree.tree_map(floating, task) for task in drawn]


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """The weights fit one batch, pulled to ``hparams["start"]``, and are judged by another."""

    loss: Callable[[Tree, Batch], Tensor]

    def inner(self, params: Tree, hparams: Tree, task: dict[str, Batch]) -> Tensor:
        start = hparams["start"]
        distance: Any = sum((params[k] - start[k]).square().sum() for k in params)
        return self.loss(params, task["fit"]) + hparams["log_pull"].exp() / 2 * distance

    def outer(self, params: Tree, hparams: Tree, task: dict[str, Batch]) -> Tensor:
        return self.loss(params, task["judge"])


def by_torch(net: nn.Module) -> Adaptation:
    return Adaptation(lambda params, batch: functional_call(net, params, (), batch).loss)


def gradient(loss: Callable[[Tree], Tensor], at: Tree, create_graph: bool = False) -> Tree:
    """The gradient of a function of a tree by torch."""
    leaves, spec = optree.tree_flatten(at)
    if not create_graph:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = loss(optree.tree_unflatten(spec, leaves))
    grads = torch.autograd.grad(
        value, leaves, create_graph=create_graph, materialize_grads=True, allow_unused=True
    )
    return optree.tree_unflatten(spec, list(grads))


class InFloat64(nn.Module):
    """A model that computes in float64 what it would cast to float32: norms, softmax, losses."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: Any) -> Any:
        with _Float64():
            return self.net(**inputs)


class _Float64(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, kwargs = optree.tree_map(
            lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)
