"""The demonstration behind `make demo`: start the service, call every method, write a report, stop.

It uses nothing but the client and the pictures that the bundle ships, which no model was trained on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import monofacet
import numpy as np
import pictures
import report
from audits import audit_bias, screen
from monofacet import Client, FeatureCard, ModalityLabel, ScoreSettings
from rich.console import Console
from rich.progress import track
from rich.table import Table
from samples import AttackedSample, Sample, load_attacked, load_samples
from service import ServiceError, running_service

ROOT = Path(__file__).resolve().parents[2]
SHOWN_LABELS = (ModalityLabel.IMAGE, ModalityLabel.TEXT, ModalityLabel.CROSS)
CARDS_PER_LABEL = 2
# A picture with a colour and a shape of its own, and one to be drawn again.
REFERENCE, DRAWN_AGAIN = "maple leaf", "person curly hair"


def describe_model(client: Client, console: Console) -> monofacet.Model:
    """Print what is served and return it."""
    model = client.model()
    table = Table(title=f"{model.bundle}: {model.tower.architecture}, on {model.runtime.backend}")
    for heading in ("dictionary", "kind", "features", "default"):
        table.add_column(heading)
    for item in model.dictionaries:
        table.add_row(item.name, item.kind, str(item.n_features), "yes" if item.is_default else "")
    console.print(table)
    return model


def retrieve(client: Client, samples: list[Sample], console: Console) -> list[report.Retrieved]:
    """Encode the samples and their captions; return the three nearest captions of each picture."""
    captions = sorted({s.caption for s in samples})
    pictures = client.encode([s.data for s in samples], dictionary="")
    texts = client.encode(captions)
    similarity = pictures.embeddings @ texts.embeddings.T
    order = np.argsort(-similarity, axis=1)[:, :3]
    rows = [
        report.Retrieved(sample, [(captions[j], float(similarity[i, j])) for j in order[i]])
        for i, sample in enumerate(samples)
    ]
    hits = sum(row.right for row in rows)
    active = np.mean([len(f) for f in pictures.features])
    console.print(
        f"encoded {len(samples)} pictures and {len(captions)} captions: the nearest caption is right for "
        f"{hits} of {len(samples)}; {active:.0f} features active in a picture"
    )
    return rows


def stream(client: Client, samples: list[Sample], console: Console) -> int:
    """Stream pictures, captions and one broken picture; return how many items were refused by themselves."""
    broken = samples[0].data[: len(samples[0].data) // 2]
    items = (
        [(s.name, s.data) for s in samples]
        + [("broken.png", broken)]
        + [(f"text {s.name}", s.caption) for s in samples]
    )
    results = list(
        track(client.stream_encode(items), total=len(items), description="streaming", console=console)
    )
    refused = [r for r in results if not r.ok]
    for result in refused:
        console.print(f"  {result.id}: {result.error}")
    return len(refused)


def classify(client: Client, samples: list[Sample], console: Console) -> list[report.Classified]:
    """Ask which features speak in each picture and in its caption."""
    shown = samples[:6]
    inputs = [x for s in shown for x in (s.data, s.caption)]
    answers = client.classify_modality(inputs).classifications
    table = Table(title="energy by label, and the strongest features")
    for heading in ("input", *(label.value for label in SHOWN_LABELS), "features"):
        table.add_column(heading)
    rows = []
    for sample, picture, text in zip(shown, answers[::2], answers[1::2], strict=True):
        rows.append(report.Classified(sample, picture, text))
        for what, answer in ((f"picture of {sample.caption}", picture), (f"“{sample.caption}”", text)):
            names = ", ".join(f.name or str(f.feature) for f in answer.top_features[:4])
            table.add_row(what, *(f"{answer.shares[label]:.0%}" for label in SHOWN_LABELS), names)
    console.print(table)
    return rows


def best_cards(cards: list[FeatureCard], label: ModalityLabel) -> list[FeatureCard]:
    """Return the features of a label whose name predicts them best."""
    named = [c for c in cards if c.label is label and c.name and c.name_auc is not None]
    return sorted(named, key=lambda c: (-(c.name_auc or 0.0), -c.energy_image - c.energy_text))[
        :CARDS_PER_LABEL
    ]


def describe_features(client: Client, model: monofacet.Model, console: Console) -> report.Features:
    """List the features of every dictionary with a modality table, and fetch the best cards of the default one."""
    tables = {
        item.name: list(client.features(dictionary=item.name))
        for item in model.dictionaries
        if item.has_modality
    }
    default = next(item.name for item in model.dictionaries if item.is_default)
    table = Table(title="features by label")
    for heading in ("dictionary", *(label.value for label in ModalityLabel)):
        table.add_column(heading)
    for name, cards in tables.items():
        counts = [sum(c.label is label for c in cards) for label in ModalityLabel]
        table.add_row(name, *(f"{n} ({n / len(cards):.0%})" for n in counts))
    console.print(table)
    chosen = [card for label in SHOWN_LABELS for card in best_cards(tables[default], label)]
    details = [
        client.feature(card.feature, dictionary=default, max_images=5, max_texts=5)
        for card in track(chosen, description="feature cards", console=console)
    ]
    return report.Features(default, tables, details)


def call_everything(
    client: Client, samples: list[Sample], attacked: AttackedSample | None, console: Console
) -> report.Demo:
    """Call every method, print what it answers, and return it for the report."""
    model = describe_model(client, console)
    retrieved = retrieve(client, samples, console)
    refused = stream(client, samples, console)
    classified = classify(client, samples, console)
    features = describe_features(client, model, console)
    scored = client.score_modality(
        ((s.data, s.caption) for s in samples), ScoreSettings(bootstrap_samples=200, shuffles=200, seed=0)
    )
    console.print(f"scored {len(scored.cards)} features on {scored.pairs} pairs of our own")
    bias = audit_bias(client, console)
    screened = screen(client, samples, attacked, console)
    reference = next(s for s in samples if s.caption == REFERENCE)
    previewed = pictures.preview(client, reference, console)
    generated, steered, round_trip = None, [], None
    if model.pipeline is not None:
        generated = pictures.generate_sheet(client, console)
        steered = pictures.steer(client, features.tables[features.default], console)
        again = next(s for s in samples if s.caption == DRAWN_AGAIN)
        round_trip = pictures.round_trip(client, again, model.tower.embed_dim)
    return report.Demo(
        model=model,
        retrieved=retrieved,
        classified=classified,
        features=features,
        scored=scored,
        refused=refused,
        bias=bias,
        screened=screened,
        preview=previewed,
        generated=generated,
        steered=steered,
        round_trip=round_trip,
        health=client.health(),
    )


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=ROOT / "bundles" / "emoji")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo")
    arguments = parser.parse_args()
    console = Console()
    arguments.out.mkdir(parents=True, exist_ok=True)
    samples = load_samples(arguments.bundle)
    started = time.perf_counter()
    try:
        with running_service(arguments.bundle, arguments.out / "service.log", console) as service:
            ready = time.perf_counter()
            with Client(service.target) as client:
                demo = call_everything(client, samples, load_attacked(arguments.bundle, samples), console)
            answered = time.perf_counter()
            # The service drains while the report is written.
            service.stop()
            path = report.write(arguments.out, demo, seconds=answered - started)
    except (ServiceError, monofacet.MonofacetError) as error:
        console.print(f"demo: failed: {error}", style="bold red", markup=False, highlight=False)
        raise SystemExit(1) from error
    seconds = time.perf_counter() - started
    summary = {
        "bundle": demo.model.bundle,
        "right": sum(r.right for r in demo.retrieved),
        "of": len(demo.retrieved),
        "seconds": seconds,
    }
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print(
        f"demo: called every method; start {ready - started:.0f} s, calls {answered - ready:.0f} s, "
        f"stop and report {seconds - answered + started:.0f} s; results: {path}, with summary.json and "
        "service.log beside it",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
