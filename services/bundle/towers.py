"""Loading a bundle's towers: on a given backend, or in the way that is fastest on this machine."""

from __future__ import annotations

from services.bundle.load import Bundle
from services.encoding.choice import BUDGET_S, Candidate, Choice, candidates, choose, images_per_s
from services.encoding.clip import build_clip
from services.encoding.load import build_towers, choose_backend, resolve_device, use_threads
from services.encoding.machine import usable_cores
from services.encoding.towers import Towers


def load_towers(
    bundle: Bundle,
    backend: str = "auto",
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: str = "auto",
) -> Towers:
    """Load a bundle's towers.

    Parameters
    ----------
    bundle : Bundle
        Verified.
    backend : {"auto", "torch", "openvino"}
        See `choose_backend`.
    device : str
        "auto", "cpu", "cuda" or "cuda:<i>"; openvino runs on the CPU only.
    threads : int or None
        Threads of one forward; None takes all the CPUs this process may use.
    precision : {"auto", "f32", "bf16", "f16"}
        "auto" is bf16 where the processor has it natively (a GPU, or a CPU under openvino), else f32. f16 is for
        torch on a GPU.

    Raises
    ------
    UnsupportedModel
        Where backend, device and precision do not go together.
    """
    device = resolve_device(backend, device)
    return build_towers(
        build_clip(bundle.clip_config, bundle.clip_weights),
        bundle.clip_config,
        choose_backend(device) if backend == "auto" else backend,
        device=device,
        threads=threads or usable_cores(),
        precision=precision,
    )


def choose_towers(
    bundle: Bundle,
    backend: str = "auto",
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: str = "auto",
    budget_s: float = BUDGET_S,
) -> tuple[Towers, Choice]:
    """Load a bundle's towers in the way that is fastest here.

    Parameters
    ----------
    bundle, backend, device, precision
        As `load_towers`.
    threads : int or None
        Threads of one forward; None leaves the number open.
    budget_s : float
        Seconds of measuring, beyond the loading of what is likeliest.

    Raises
    ------
    UnsupportedModel
        Where backend, device and precision do not go together.
    """
    device = resolve_device(backend, device)
    found = candidates(backend, threads, device, choose_backend(device))
    model = build_clip(bundle.clip_config, bundle.clip_weights)
    built: dict[Candidate, Towers] = {}
    converted = None
    if [candidate.backend for candidate in found].count("openvino") > 1:
        from services.encoding.openvino_backend import convert_towers

        # Once for all numbers of threads: it takes longer than to compile and measure one.
        converted = convert_towers(model, bundle.clip_config)

    def build(candidate: Candidate) -> Towers:
        if candidate not in built:
            built[candidate] = build_towers(
                model,
                bundle.clip_config,
                candidate.backend,
                device=device,
                threads=candidate.threads,
                precision=precision,
                converted=converted,
            )
        return built[candidate]

    build(found[0])
    # It has to be built in any case, so the budget begins after it.
    choice = choose(found, lambda candidate: images_per_s(build(candidate)), budget_s)
    for candidate, towers in built.items():
        if candidate != choice.candidate:
            towers.close()
    # Torch's number of threads is the process's, and the last candidate has set it.
    use_threads(choice.candidate.threads)
    return built[choice.candidate], choice
