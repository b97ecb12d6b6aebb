"""The data sets on the Hugging Face Hub, by script-free id and pinned revision: the one place that names them."""

from zoft.tasks.types import HubSource

_VALIDATED = {"train": "train", "test": "validation"}
_TESTED = {"train": "train", "test": "test"}


def _glue(config: str, test: str = "validation") -> HubSource:
    return HubSource(
        "nyu-mll/glue", config, "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c", {"train": "train", "test": test}
    )


def _super_glue(config: str) -> HubSource:
    return HubSource("aps/super_glue", config, "3de24cf8022e94f4ee4b9d55a6f539891524d646", _VALIDATED)


SST2 = _glue("sst2")
MNLI = _glue("mnli", "validation_matched")
RTE = _super_glue("rte")
CB = _super_glue("cb")
COPA = _super_glue("copa")
WIC = _super_glue("wic")
WSC = _super_glue("wsc.fixed")
MULTIRC = _super_glue("multirc")
RECORD = _super_glue("record")
BOOLQ = HubSource("google/boolq", None, "35b264d03638db9f4ce671b711558bf7ff0f80d5", _VALIDATED)
SQUAD = HubSource("rajpurkar/squad", None, "7b6d24c440a36b6815f21b70d25016731768db1f", _VALIDATED)
DROP = HubSource("ucinlp/drop", None, "95cda593fae71b60b5b19f82de3fcf3298c1239c", _VALIDATED)
SST5 = HubSource("SetFit/sst5", None, "e51bdcd8cd3a30da231967c1a249ba59361279a3", _TESTED)
SNLI = HubSource("stanfordnlp/snli", None, "cdb5c3d5eed6ead6e5a341c8e56e669bb666725b", _TESTED, "label")
TREC = HubSource("CogComp/trec", None, "refs/convert/parquet", _TESTED)
GSM8K = HubSource("openai/gsm8k", "main", "e53f048856ff4f594e959d75785d2c2d37b678ee", _TESTED)
METAMATHQA = HubSource("meta-math/MetaMathQA", None, "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18", {"train": "train"})
