"""The layers inside the registry: a folder imports from itself and from those before it."""

from ..test_structure import imports

LAYERS = ("card", "hub", "stores", "match", "released")


def test_folders_import_from_those_before_them() -> None:
    depth = {f"zoft.registry.{name}": i for i, name in enumerate(LAYERS)}

    def folder(module: str) -> int | None:
        return depth.get(".".join(module.split(".")[:3]))

    wrong = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if (above := folder(name)) is not None and (below := folder(other)) is not None and below > above
    ]
    assert not wrong


def test_others_import_from_the_package_itself() -> None:
    deep = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if not name.startswith("zoft.registry") and other.startswith("zoft.registry.")
    ]
    assert not deep
