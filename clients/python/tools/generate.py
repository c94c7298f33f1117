"""Generate the Python stubs from the contract: ``python clients/python/tools/generate.py [OUT]``.

The stubs are committed, so that installing the client needs no compiler; a test generates them again and
compares. ``OUT`` is the directory that holds the ``monofacet`` package, by default ``clients/python``.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[3]
PROTOS = ROOT / "protos"
CONTRACT = "monofacet/v1"
RULES = "buf/validate/validate.proto"


def compile_protos(out: Path) -> None:
    """Run protoc for the contract and the validation rules that it imports.

    Parameters
    ----------
    out
        An empty directory for what protoc writes.

    Raises
    ------
    RuntimeError
        If protoc fails; it has said why on standard error.
    """
    scripts = Path(sys.executable).parent
    contract = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / CONTRACT).glob("*.proto"))
    common = [
        "protoc",
        f"-I{PROTOS}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
        f"--python_out={out}",
        f"--mypy_out=quiet:{out}",
    ]
    grpc = [f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}"]
    for arguments in ([*common, RULES], [*common, *grpc, *contract]):
        if protoc.main(arguments) != 0:
            raise RuntimeError(f"protoc failed: {' '.join(arguments)}")


def install(generated: Path, package: Path) -> None:
    """Move what protoc wrote into the package.

    The rules' module does not go to ``buf/validate``: a second wheel with that top-level package would
    overwrite ours or be overwritten. It becomes ``monofacet/v1/_validate_pb2``; ``monofacet/_rules`` chooses
    between the two.

    Parameters
    ----------
    generated
        What `compile_protos` wrote.
    package
        The ``monofacet`` package; the stubs in its ``v1`` are replaced.
    """
    target = package / "v1"
    target.mkdir(parents=True, exist_ok=True)
    for old in [*target.glob("*_pb2*.py"), *target.glob("*_pb2*.pyi")]:
        old.unlink()
    rules = sorted((generated / RULES).parent.iterdir())
    for path in [*rules, *sorted((generated / CONTRACT).iterdir())]:
        # A grpc module for a file without services holds nothing but a version check.
        if "_grpc" in path.name and not has_services(path.name.partition("_pb2")[0]):
            continue
        text = path.read_text(encoding="utf-8").replace(
            "from buf.validate import", "from monofacet._rules import"
        )
        name = f"_{path.name}" if path in rules else path.name
        (target / name).write_text(text, encoding="utf-8")


def has_services(stem: str) -> bool:
    """Tell whether a file of the contract declares a service.

    Parameters
    ----------
    stem
        Its name without the suffix.

    Returns
    -------
    bool
        True if it does.
    """
    return "\nservice " in (PROTOS / CONTRACT / f"{stem}.proto").read_text(encoding="utf-8")


def main() -> None:
    """Generate into the given directory, or in place."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "clients" / "python"
    with tempfile.TemporaryDirectory() as temporary:
        generated = Path(temporary)
        compile_protos(generated)
        install(generated, out / "monofacet")
    print(f"stubs in {out / 'monofacet'}, by grpcio-tools {version('grpcio-tools')}")


if __name__ == "__main__":
    main()
