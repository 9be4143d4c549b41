"""Models of Hugging Face's transformers on this package, beside their own ("eager") attention.

They are tiny, have random weights, and need no network. The rule is that of tests/compare.py for
whole models: against the model computed in float32, logits and gradients have at most twice the
error that the model has with eager attention in bfloat16.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from backends import GPU
from compare import assert_as_exact_as_torch, largest
from torch import Tensor, nn

from flash_attn.version import __version__

pytestmark = pytest.mark.gpu

DTYPE = torch.bfloat16
WINDOW = 40
# initializer_range: scores between -3 and 3, so that a wrong mask, scale or sink shows.
SIZES: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=256,  # its root, by which Gemma 2 multiplies, is exact in bfloat16
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.06,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=None,  # so that generate() never ends early
    pad_token_id=0,
)
# One expert: where there are more, rounding decides which take part.
EXPERTS = dict(num_local_experts=1, num_experts_per_tok=1, experts_implementation="eager")
LAYERS = ["sliding_attention", "full_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(head_dim=64)),
    "llama_80": ("Llama", dict(head_dim=80)),
    "mistral": ("Mistral", dict(head_dim=64, sliding_window=WINDOW)),
    "gemma2": (
        "Gemma2",
        dict(
            head_dim=80,
            sliding_window=WINDOW,
            attn_logit_softcapping=1.0,
            query_pre_attn_scalar=48,
            layer_types=LAYERS,
        ),
    ),
    "gpt_oss": ("GptOss", dict(head_dim=64, sliding_window=WINDOW, layer_types=LAYERS, **EXPERTS)),
}
NEW_TOKENS = 12


def write_metadata(folder: Path) -> Path:
    """What an installed package has beside it, for one that is imported from its source tree."""
    metadata = folder / f"flash_attn-{__version__}.dist-info"
    metadata.mkdir()
    name_and_version = f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {__version__}\n"
    (metadata / "METADATA").write_text(name_and_version)
    (metadata / "top_level.txt").write_text("flash_attn\nflash_attn_2_cuda\n")
    return folder


def distributions() -> list[str]:
    """Those that provide the package, as far as importlib can tell; transformers asks this way."""
    return importlib.metadata.packages_distributions().get("flash_attn", [])


def forget_packages(transformers: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Makes transformers look for packages again, should something have imported it before."""
    import_utils = transformers.utils.import_utils
    for function in vars(import_utils).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    mapping = getattr(import_utils, "PACKAGE_DISTRIBUTION_MAPPING", None)
    if mapping is not None:
        patch.setitem(mapping, "flash_attn", distributions())


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The library, which takes the package for installed by its metadata."""
    with pytest.MonkeyPatch.context() as patch:
        if not {"flash-attn", "flash_attn"} & set(distributions()):
            patch.syspath_prepend(write_metadata(tmp_path_factory.mktemp("site")))
        module = pytest.importorskip("transformers", minversion="4.48")
        forget_packages(module, patch)
        yield module


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """For modules made inside; unlike module.to(dtype) it leaves rotary frequencies in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Models(NamedTuple):
    """One model three times, with the same weights."""

    exact: nn.Module
    eager: nn.Module
    flash: nn.Module


MakeModels = Callable[[str], Models]


@pytest.fixture
def make_models(transformers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> MakeModels:
    def make(name: str) -> Models:
        family, options = MODELS[name]
        causal_lm = getattr(transformers, f"{family}ForCausalLM", None)
        if causal_lm is None:
            pytest.skip(f"transformers {transformers.__version__} has no {family}")
        config_class = getattr(transformers, f"{family}Config")
        try:
            config_class(attn_implementation="flash_attention_2")
        except ValueError as error:  # of 5.0: GPT-OSS with another kernel than the one it names
            pytest.skip(str(error))
        # GPT-OSS lists the kernels that know sinks, and asks for one of them instead of this.
        base = causal_lm.__mro__[1]
        monkeypatch.setattr(base, "_supports_flash_attn", True, raising=False)
        monkeypatch.setattr(base, "_compatible_flash_implementations", None, raising=False)

        def model(dtype: torch.dtype, attention: str) -> nn.Module:
            config = config_class(**SIZES, **options, attn_implementation=attention)
            with default_dtype(dtype), torch.device(GPU):
                made = causal_lm(config)
            assert made.config._attn_implementation == attention
            return made

        exact = model(torch.float32, "eager")
        with torch.no_grad():
            for path, parameter in exact.named_parameters():
                if path.endswith("sinks"):
                    parameter.normal_(mean=2.0)
                parameter.copy_(parameter.to(DTYPE))
        models = Models(exact, model(DTYPE, "eager"), model(DTYPE, "flash_attention_2"))
        for other in models[1:]:
            other.load_state_dict(exact.state_dict())
        return models

    return make


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], shape, device=GPU)


def logits_and_gradients(
    model: nn.Module, calls: list[dict[str, Tensor]], dlogits: Tensor
) -> dict[str, Tensor]:
    """Logits of all tokens that aren't padding, one call after the other, and what `dlogits` gives
    to every parameter."""
    model.train()
    logits = []
    for call in calls:
        real = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
        logits.append(model(**call, use_cache=False).logits[real])
    of_all = torch.cat(logits)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(of_all, parameters, dlogits.to(of_all))
    return {"logits": of_all.detach(), **dict(zip(names, gradients, strict=True))}


def check(flash: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, expected in exact.items():
        # Of few elements, as in a gradient of sinks, the largest error is a matter of luck.
        floor = (1 if expected.numel() > 64 else 3) * torch.finfo(DTYPE).eps * largest(expected)
        assert_as_exact_as_torch(name, flash[name], eager[name], expected.double(), DTYPE, floor)


def check_training(
    models: Models, flash_calls: list[dict[str, Tensor]], eager_calls: list[dict[str, Tensor]]
) -> None:
    tokens = sum(
        int(call["attention_mask"].sum()) if "attention_mask" in call else call["input_ids"].numel()
        for call in flash_calls
    )
    dlogits = torch.randn(tokens, SIZES["vocab_size"], device=GPU).to(DTYPE)
    exact, eager = (logits_and_gradients(m, eager_calls, dlogits) for m in models[:2])
    check(logits_and_gradients(models.flash, flash_calls, dlogits), eager, exact)


def test_the_package_is_found(transformers: ModuleType) -> None:
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal

    assert is_flash_attn_2_available()
    assert is_flash_attn_greater_or_equal("2.8.3")


@pytest.mark.parametrize("name", MODELS)
def test_training(name: str, make_models: MakeModels) -> None:
    calls = [{"input_ids": random_tokens(2, 130)}]
    check_training(make_models(name), calls, calls)


@pytest.mark.parametrize("name", MODELS)
def test_training_with_padding(name: str, make_models: MakeModels) -> None:
    """On the right, through flash_attn_varlen_func."""
    lengths = torch.tensor([[70], [200], [131]], device=GPU)
    mask = (torch.arange(200, device=GPU) < lengths).long()
    calls = [{"input_ids": random_tokens(3, 200) * mask, "attention_mask": mask}]
    check_training(make_models(name), calls, calls)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_training_on_packed_sequences(name: str, make_models: MakeModels) -> None:
    """Where positions begin anew there begins a sequence; eager attention gets them one by one."""
    tokens = [random_tokens(1, length) for length in (70, 1, 129)]
    positions = [torch.arange(x.shape[1], device=GPU)[None] for x in tokens]
    packed = {"input_ids": torch.cat(tokens, 1), "position_ids": torch.cat(positions, 1)}
    check_training(make_models(name), [packed], [{"input_ids": x} for x in tokens])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_generate(name: str, make_models: MakeModels) -> None:
    """Greedy, with padding on the left. Whatever token comes out, the logits that chose it, of a
    cache that grows, are those of eager attention over all tokens up to there."""
    models = make_models(name)
    lengths = torch.tensor([[150], [83]], device=GPU)
    mask = (torch.arange(150, device=GPU) >= 150 - lengths).long()
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True)
    generated = models.flash.eval().generate(
        random_tokens(2, 150) * mask, attention_mask=mask, return_dict_in_generate=True, **options
    )
    flash = torch.stack(generated.logits, 1)
    chosen = generated.sequences[:, 150:]
    assert chosen.shape == (2, NEW_TOKENS)
    assert torch.equal(chosen, flash.argmax(-1))
    whole = torch.cat([mask, torch.ones_like(chosen)], 1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)

    def of_steps(model: nn.Module) -> Tensor:
        call = dict(attention_mask=whole, position_ids=positions, use_cache=False)
        return model.eval()(generated.sequences, **call).logits[:, 149:-1]

    eager, exact = of_steps(models.eager), of_steps(models.exact)
    for step in range(NEW_TOKENS):
        check(*({f"step {step}": x[:, step]} for x in (flash, eager, exact)))
