"""The losses and the retrieval figures against plain loops, and a tiny training that is cut and goes on exactly."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from training.compute import coarse_products
from training.towers.caption_words import Captions, CaptionWords
from training.towers.contrastive import contrastive_loss, encode_text, supervised_contrastive
from training.towers.export import CONFIG, export_checkpoint
from training.towers.image_tower import ImageTower, WeightAverage, folded
from training.towers.pairs import Corpus
from training.towers.retrieval import bootstrap_mean, participation_ratio, ranks, retrieval
from training.towers.settings import TowerSettings
from training.towers.text_tower import start_as_a_sum
from training.towers.train import TowerTrainer, build_model
from training.towers.validate import on_artist, on_validation


def _unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def test_the_loss_equals_a_plain_loop_over_positives_and_negatives():
    torch.manual_seed(0)
    images, captions = _unit(5, 8), _unit(7, 8)
    target = torch.tensor([0, 1, 1, 2, 0])
    ignore = torch.zeros(5, 7, dtype=torch.bool)
    ignore[0, 5] = ignore[3, 1] = True
    got = contrastive_loss(images, captions, target, ignore, torch.tensor(10.0), 0.3)

    logits = 10 * (images @ captions.T).double()
    to_text = 0.0
    for i in range(5):
        allowed = [j for j in range(7) if not ignore[i, j]]
        to_text -= logits[i, target[i]] - torch.logsumexp(logits[i, allowed], 0)
    to_image = 0.0
    for j in range(3):
        allowed = [i for i in range(5) if not ignore[i, j]]
        own = [i for i in range(5) if target[i] == j]
        to_image -= sum(logits[i, j] - torch.logsumexp(logits[allowed, j], 0) for i in own) / len(own)
    # float32 against float64 at logits up to 10
    assert float(got) == pytest.approx(float(to_text / 5 + 0.3 * to_image / 3), abs=1e-5)


def test_the_supervised_contrastive_loss_and_its_gradient_equal_a_plain_loop_over_pairs():
    torch.manual_seed(0)
    projections = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    # 7 has no other of its concept: it is a negative of all and an anchor of nothing.
    labels = [1, 1, 4, 1, 4, 7]
    got = supervised_contrastive(F.normalize(projections, dim=-1), torch.tensor(labels), 0.1)
    (gradient,) = torch.autograd.grad(got, projections)

    z = projections / projections.norm(dim=1, keepdim=True)
    anchors = []
    for i in range(6):
        positives = [j for j in range(6) if j != i and labels[j] == labels[i]]
        if not positives:
            continue
        below = sum(torch.exp(z[i] @ z[j] / 0.1) for j in range(6) if j != i)
        anchors.append(
            -sum(torch.log(torch.exp(z[i] @ z[j] / 0.1) / below) for j in positives) / len(positives)
        )
    expected = sum(anchors) / len(anchors)
    (expected_gradient,) = torch.autograd.grad(expected, projections)
    assert len(anchors) == 5
    # float64 sums in another order
    torch.testing.assert_close(got, expected, atol=0, rtol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-12, rtol=1e-9)


def test_a_batch_without_two_of_a_concept_has_no_positive_to_learn_from():
    z = _unit(3, 4)
    same = supervised_contrastive(z[[0, 0, 1]], torch.tensor([5, 5, 6]), 0.5)
    # Two that coincide against one other: log(1 + exp((cos - 1) / t)) for either.
    assert float(same) == pytest.approx(float(torch.log1p(torch.exp((z[0] @ z[1] - 1) / 0.5))), rel=1e-5)


def test_a_caption_is_the_normalised_sum_of_its_words():
    torch.manual_seed(0)
    words = CaptionWords(np.array(["a b", "b c c"]), [[3, 7], [7, 9, 9]], dim=4)
    a, b, c = words.vectors.weight
    # fp32 sums in another order
    close = {"atol": 1e-6, "rtol": 0.0}
    assert torch.allclose(
        words(np.array([1, 0])), F.normalize(torch.stack([b + 2 * c, a + b]), dim=-1), **close
    )
    # 5 is a token of no caption
    assert torch.allclose(words.embed([[9, 5, 3]]), F.normalize((c + a)[None], dim=-1), **close)


def test_variance_in_equal_directions_counts_each_of_them_once():
    embeddings = np.vstack([np.eye(3), -np.eye(3)])
    assert participation_ratio(embeddings) == pytest.approx(3.0)
    assert participation_ratio(embeddings * [1.0, 0.0, 0.0]) == pytest.approx(1.0)


def test_ranks_count_ties_against_the_query_and_any_right_answer_for_it():
    answers = np.eye(3, dtype=np.float32)
    queries = np.array([[1, 0, 0], [0.6, 0.8, 0], [0.7, 0.7, 0]], dtype=np.float32)
    labels = np.array(["a", "b", "c"])
    assert ranks(queries, answers, np.array(["a", "a", "b"]), labels).tolist() == [0, 1, 1]


def test_perfect_towers_retrieve_everything_in_both_directions():
    embeddings = np.eye(6, dtype=np.float32)
    captions = np.array(list("abcdef"))
    result = retrieval(embeddings, captions, embeddings, captions)
    assert result.image_to_text[1].value == result.text_to_image[1].value == 1.0


def test_the_bootstrap_interval_covers_the_mean_at_about_its_level():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        interval = bootstrap_mean((rng.random(100) < 0.3).astype(float), resamples=300, seed=seed)
        covered += interval.low <= 0.3 <= interval.high
    # 95% nominal; a binomial with n = 200 stays above 88% with p > 0.999
    assert covered >= 176


def test_an_average_keeps_little_of_the_start_and_then_its_share_and_can_be_tried_on():
    module = torch.nn.BatchNorm1d(2).requires_grad_(False)
    average = WeightAverage(0.5)
    seen = []
    expected = None
    for step in range(12):
        with torch.no_grad():
            module.weight.fill_(float(step))
            module.running_mean.fill_(-float(step))
        average.update(module)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = float(step) if expected is None else keep * expected + (1 - keep) * step
        seen.append(float(average.values["weight"][0]))
        assert seen[-1] == pytest.approx(expected, rel=1e-6)
    assert float(average.values["running_mean"][0]) == pytest.approx(-expected, rel=1e-6)
    with average.applied(module):
        assert float(module.weight[0]) == pytest.approx(expected, rel=1e-6)
    assert float(module.weight[0]) == 11.0
    average.restart()
    with average.applied(module):
        assert float(module.weight[0]) == 11.0
    average.update(module)
    average.settle(module)
    assert float(average.values["weight"][0]) == float(module.weight[0]) == 11.0


def test_schedules_rise_fall_and_change_resolution_where_the_settings_say():
    phase = TowerSettings().images(64)
    assert [phase.resolution(p) for p in (0.0, 0.599, 0.6, 0.999)] == [40, 40, 64, 64]
    assert [round(phase.strength(p), 3) for p in (0.0, 0.25, 0.5, 1.0)] == [0.3, 0.5, 0.7, 0.7]
    assert phase.rate(0.0) == pytest.approx(1e-3 / 0.05)
    assert phase.rate(0.3) == 1.0
    assert phase.rate(0.8) == pytest.approx(0.5)
    locked = TowerSettings().locked(64)
    assert locked.resolution(0.0) == 64
    assert locked.rate(0.5) == pytest.approx(0.4 * 0.5)
    assert [round(locked.strength(p), 3) for p in (0.0, 0.7, 0.85, 1.0)] == [0.7, 0.7, 0.6, 0.5]


def test_coarse_products_leave_the_precision_as_they_found_it():
    before = torch.get_float32_matmul_precision()
    with coarse_products(torch.float32):
        assert torch.get_float32_matmul_precision() == before
    with pytest.raises(KeyError), coarse_products(torch.bfloat16):
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_captions_are_those_with_and_without_tone_and_know_their_concept_and_gender():
    columns = {
        "caption": np.array(["man dark skin tone", "man", "cat", "wrench"]),
        "concept": np.array(["man", "man", "cat", "wrench"]),
        "gender": np.array(["man", "man", "", ""]),
    }
    table = Captions.of(columns, np.array([0, 2]), np.array([3]))
    assert table.texts.tolist() == ["cat", "man", "man dark skin tone", "wrench"]
    assert table.concept[1] == table.concept[2] != table.concept[0] != table.concept[3]
    assert table.gender.tolist() == ["", "man", "man", ""]
    assert table.texts[table.drawn].tolist() == ["cat", "man", "man dark skin tone"]


def _tiny_corpus():
    rng = np.random.default_rng(0)
    things = np.array([f"thing {i}" for i in range(8)])
    # Two artists draw all things, a third two of them; icons; and the held-out drawings of the first two.
    concept = np.concatenate([things, things, things[:2], things[:6], things[:6]])
    n = len(concept)
    columns = {
        "set": np.array(["a"] * 8 + ["b"] * 8 + ["c"] * 2 + ["icons"] * 6 + ["a", "b"] * 3),
        "split": np.array(["train"] * 18 + ["auxiliary"] * 6 + ["validation"] * 6),
        "caption": concept,
        "concept": concept,
        "tone": np.array([""] * n),
        "gender": np.array(["man", "woman"] * (n // 2)),
        "sibling": np.zeros(n, dtype=bool),
        "restyled": np.array([*range(18), *[-1] * 12]),
    }
    pixels = rng.integers(0, 255, (n, 32, 32, 3), dtype=np.uint8)
    return Corpus(columns, pixels, pixels[:18], pixels[:18])


def _tiny_config():
    config = json.loads(CONFIG.read_text())
    config["model_cfg"]["vision_cfg"] |= {"image_size": 32, "timm_model_name": "test_resnet"}
    config["model_cfg"]["text_cfg"] |= {"width": 16, "heads": 2, "layers": 1}
    config["model_cfg"]["embed_dim"] = 16
    return config


TINY = TowerSettings(
    steps=6,
    batch=8,
    low_resolution=24,
    low_share=0.5,
    text_steps=3,
    text_batch=8,
    gender_from=0.0,
    tune_steps=4,
    seed=1,
)


@pytest.fixture
def tiny_trainer(tmp_path):
    def make(folder, precision=torch.float32, **changes):
        settings = replace(TINY, **changes)
        return TowerTrainer(_tiny_config(), _tiny_corpus(), settings, tmp_path / folder, precision=precision)

    return make


class Cut(Exception):
    """Where a training ends without notice."""


def _run_until(trainer, steps):
    """Train, saving every step, until the image tower has taken `steps` steps, and stop there without warning."""
    step = trainer.train_step

    def counted():
        if trainer.step == steps:
            raise Cut
        return step()

    trainer.train_step = counted
    with pytest.raises(Cut):
        trainer.run(validate_every=3, save_every=1)


def _weights(folder):
    return load_file(folder / "open_clip_model.safetensors")


def test_a_training_that_is_cut_in_every_phase_ends_in_the_weights_of_one_that_was_not(
    tiny_trainer, tmp_path, monkeypatch
):
    tiny_trainer("whole").run(validate_every=3, save_every=3)
    # At the low and at the high resolution, before and in the locked phase.
    for steps in (2, 4, 6, 8):
        trainer = tiny_trainer("cut")
        if steps > 2:
            trainer.resume()
            assert trainer.step == steps - 2
        torch.rand(steps)
        _run_until(trainer, steps)
    # Cut while the text tower trained: all of that phase is done anew.
    images_done = tiny_trainer("texts")
    with monkeypatch.context() as patch:
        patch.setattr("training.towers.train.TextDistiller.train_step", lambda self: _raise())
        with pytest.raises(Cut):
            images_done.run(validate_every=3, save_every=3)
    for folder in ("cut", "texts"):
        last = tiny_trainer(folder)
        last.resume()
        torch.rand(5)
        last.run(validate_every=3, save_every=3)
    whole = _weights(tmp_path / "whole")
    for folder in ("cut", "texts"):
        again = _weights(tmp_path / folder)
        assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [(entry["phase"], entry["step"]) for entry in log] == [
        ("images", 3),
        ("images", 6),
        ("texts", 6),
        ("locked", 9),
        ("locked", 10),
    ]
    assert all(0 <= entry["r1"] <= 1 and entry["minutes"] >= 0 for entry in log)
    assert {"clip", "concept", "gender"} <= set(log[0])


def _raise():
    raise Cut


def test_tuning_moves_the_image_tower_alone(tiny_trainer):
    trainer = tiny_trainer("tune")
    trainer.train_images(6, 6)
    trainer.train_texts()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    words = trainer.words.vectors.weight.clone()
    trainer.train_images(6, 6)
    moved = {n for n, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved
    assert {name.split(".")[0] for name in moved} <= {"visual", "logit_scale"}
    assert torch.equal(words, trainer.words.vectors.weight)


def test_a_step_in_bfloat16_has_the_loss_of_one_in_float32_and_keeps_weights_in_float32(tiny_trainer):
    one, two = tiny_trainer("float32"), tiny_trainer("bfloat16", precision=torch.bfloat16)
    exact, rounded = one.train_step(), two.train_step()
    # The same draws and weights; bfloat16 keeps eight bits, 0.4% a product.
    assert rounded == pytest.approx(exact, rel=0.02)
    assert {p.dtype for p in two.model.parameters()} == {torch.float32}
    assert torch.isfinite(torch.cat([p.flatten() for p in two.model.parameters()])).all()


def test_text_cut_to_its_length_embeds_like_open_clip_itself(tiny_trainer):
    model = tiny_trainer("text").model.eval()
    tokens = tiny_trainer("text").tokenizer(["a cat", "a drawing of a man firefighter medium skin tone", "x"])
    with torch.inference_mode():
        expected = F.normalize(model.encode_text(tokens), dim=-1)
        # fp32 sums in another order
        assert torch.allclose(encode_text(model, tokens), expected, atol=1e-5)


def test_folded_weights_embed_like_the_tower_with_its_standardisation():
    torch.manual_seed(0)
    config = _tiny_config()
    model, preprocess = build_model(config), config["preprocess_cfg"]
    tower = ImageTower(model, preprocess["mean"], preprocess["std"], torch.float32)
    for _ in range(3):
        tower(torch.rand(16, 3, 32, 32))
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        expected = tower.eval()(images)
        plain = F.normalize(model.eval().encode_image(images * 2 - 1), dim=-1)
        model.load_state_dict(folded(model.state_dict(), tower.state_dict()))
        got = F.normalize(model.encode_image(images * 2 - 1), dim=-1)
    assert not torch.allclose(plain, expected, atol=1e-2)
    # fp32 at values up to about 3
    assert torch.allclose(got, expected, atol=1e-5)


def test_the_gender_loss_looks_only_at_gendered_pictures_and_falls_towards_their_word(tiny_trainer):
    trainer = tiny_trainer("gender")
    # "thing" is the only word known, so "man" and "woman" need vectors of their own.
    trainer.words = CaptionWords(
        np.array(["man", "woman"]),
        [trainer.tokenizer.encode("man"), trainer.tokenizer.encode("woman")],
        dim=16,
    )
    man, woman = trainer.words(np.array([0, 1])).detach()
    scale = torch.tensor(5.0)
    images = torch.stack([woman, man, man])
    right = trainer.gender_loss(images, np.array(["woman", "man", ""]), scale)
    wrong = trainer.gender_loss(images, np.array(["man", "woman", ""]), scale)
    margin = 5.0 * float(woman @ (woman - man))
    # log(1 + exp(-m)) and log(1 + exp(m)), by definition of the logistic loss; fp32
    assert float(right.detach()) == pytest.approx(np.logaddexp(0, -margin), rel=1e-4)
    assert float(wrong.detach()) == pytest.approx(np.logaddexp(0, margin), rel=1e-4)
    assert float(trainer.gender_loss(images, np.array(["", "", ""]), scale).detach()) == 0.0


def test_an_untrained_text_tower_starts_as_a_sum_of_words(tiny_trainer):
    texts, right = [f"thing {i}" for i in range(8)], []
    for seed in range(6):
        trainer = tiny_trainer("start", seed=seed)
        with torch.no_grad():
            trainer.words.vectors.weight.normal_()
        sums = torch.from_numpy(trainer.embed_texts(texts))
        start_as_a_sum(trainer.model, trainer.words)
        with torch.no_grad():
            embedded = encode_text(trainer.model, trainer.tokenizer(texts))
        right += ((embedded @ sums.T).argmax(1) == torch.arange(8)).tolist()
    # Not exact: attention is only nearly uniform and layer norms stand between. By chance, 6 of 48 would be right, and
    # 15 or more with p < 0.001.
    assert sum(right) >= 15


def test_a_whole_training_leaves_a_model_that_open_clip_loads_and_that_embeds_as_the_trainer_did(
    tiny_trainer, tmp_path
):
    trainer = tiny_trainer("export")
    trainer.run(validate_every=6, save_every=6)
    # As any user would: by open_clip's own factory, from the two files.
    folder = tmp_path / "export"
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    assert all(t.dtype == torch.float16 for t in _weights(folder).values() if t.is_floating_point())
    images = torch.rand(2, 3, 32, 32)
    texts = ["thing 1", "a drawing of thing 3"]
    with torch.no_grad():
        got = F.normalize(model.encode_image(images * 2 - 1), dim=-1)
        # weights were stored in half precision
        assert torch.allclose(got, trainer.tower.eval()(images), atol=1e-2)
        said = F.normalize(model.encode_text(trainer.tokenizer(texts)), dim=-1)
        expected = encode_text(trainer.model.eval(), trainer.tokenizer(texts))
        assert torch.allclose(said, expected, atol=1e-2)
    # The last checkpoint exports to the same.
    step = export_checkpoint(folder / "checkpoint.pt", folder / "open_clip_config.json", tmp_path / "again")
    assert step == 10
    again, final = _weights(tmp_path / "again"), _weights(folder)
    assert [name for name in final if not torch.equal(final[name], again[name])] == []


def test_an_artist_left_out_is_never_trained_on_and_is_in_the_log(tiny_trainer, tmp_path):
    trainer = tiny_trainer("without", without="b")
    assert set(trainer.corpus.columns["set"][trainer.sampler.emoji]) == {"a", "c"}
    trainer.log("images", {})
    (line,) = (tmp_path / "without" / "log.jsonl").read_text().splitlines()
    # Its training and its held-out drawings alike.
    assert json.loads(line)["b_n"] == 11
    with pytest.raises(ValueError, match="nobody"):
        tiny_trainer("typo", without="b,nobody")


def test_validation_figures_of_embeddings_that_are_known():
    corpus = _tiny_corpus()
    columns = corpus.columns
    columns["sibling"][24] = True
    things = [f"thing {i}" for i in range(8)]

    def embed_texts(texts):
        known = dict(zip([*things, "man", "woman"], np.eye(10, dtype=np.float32), strict=True))
        return np.stack([known[text] for text in texts])

    def embed_images(rows):
        right = embed_texts(columns["caption"][rows].tolist())
        # Artist b is always mistaken for the thing after it; genders are told by half a step.
        wrong = np.roll(right, 1, axis=1)
        images = np.where((columns["set"][rows] == "b")[:, None], wrong, right)
        return images + 0.5 * embed_texts(columns["gender"][rows].tolist())

    metrics = on_validation(corpus, [], embed_images, embed_texts)
    assert metrics["r1"] == metrics["r1_concept"] == 0.5
    assert metrics["r1_strict"] == pytest.approx(2 / 5)
    assert metrics["gender_auc"] == 1.0
    assert on_validation(corpus, ["b"], embed_images, embed_texts)["r1"] == 1.0
    trained = np.flatnonzero((columns["split"] == "train") & (columns["set"] != "b"))
    assert on_artist(corpus, "b", trained, embed_images, embed_texts)["b_r1"] == 0.0
    assert on_artist(corpus, "c", trained, embed_images, embed_texts) == {
        "c_n": 2,
        "c_r1": 1.0,
        "c_r5": 1.0,
        "c_r1_text": 1.0,
    }
