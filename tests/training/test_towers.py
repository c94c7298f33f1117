"""The loss and the retrieval figures against plain loops, and a tiny training that resumes exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from training.caption_words import CaptionWords
from training.clip import CONFIG, ClipTrainer, build_model, fold_standardisation
from training.clip_settings import ClipSettings
from training.contrastive import contrastive_loss, encode_text
from training.pairs import Corpus
from training.retrieval import bootstrap_mean, participation_ratio, ranks, retrieval
from training.text_tower import start_as_a_sum


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


@pytest.fixture
def tiny_trainer(tmp_path):
    rng = np.random.default_rng(0)
    n = 24
    captions = np.array([f"thing {i % 8}" for i in range(n)])
    columns = {
        "set": np.array(["a"] * n),
        "split": np.array(["train"] * 12 + ["auxiliary"] * 6 + ["validation"] * 6),
        "caption": captions,
        "concept": captions,
        "gender": np.array(["man", "woman"] * 12),
        "sibling": np.zeros(n, dtype=bool),
        "restyled": np.array([*range(12), *[-1] * 12]),
    }
    pixels = rng.integers(0, 255, (n, 32, 32, 3), dtype=np.uint8)
    corpus = Corpus(columns, pixels, pixels[:12], pixels[:12])
    config = json.loads(CONFIG.read_text())
    config["model_cfg"]["vision_cfg"] |= {"image_size": 32, "timm_model_name": "test_resnet"}
    config["model_cfg"]["text_cfg"] |= {"width": 16, "heads": 2, "layers": 1}
    config["model_cfg"]["embed_dim"] = 16

    def make(folder):
        settings = ClipSettings(
            steps=6, batch=8, low_share=0.0, text_steps=3, text_batch=8, gender_from=0.0, tune_steps=4, seed=1
        )
        return ClipTrainer(config, corpus, settings, tmp_path / folder)

    return make


def test_training_that_was_cut_and_resumed_ends_like_one_that_was_not(tiny_trainer):
    whole = tiny_trainer("whole")
    losses = [whole.train_step() for _ in range(6)]
    first = tiny_trainer("cut")
    assert [first.train_step() for _ in range(3)] == losses[:3]
    first.save()
    second = tiny_trainer("cut")
    second.resume()
    assert [second.train_step() for _ in range(3)] == losses[3:]


def test_tuning_moves_the_image_tower_alone_and_resumes_like_one_that_was_not_cut(tiny_trainer):
    whole = tiny_trainer("tune")
    whole.train_images(6, validate_every=6, save_every=6)
    whole.train_texts()
    whole.fix_captions()
    whole.save()
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    losses = [whole.train_step() for _ in range(4)]
    moved = {
        name for name, tensor in whole.model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved
    assert {name.split(".")[0] for name in moved} <= {"visual", "logit_scale"}
    again = tiny_trainer("tune")
    again.resume()
    assert again.step == 6
    assert [again.train_step() for _ in range(4)] == losses


def test_text_cut_to_its_length_embeds_like_open_clip_itself(tiny_trainer):
    model = tiny_trainer("text").model.eval()
    tokens = tiny_trainer("text").tokenizer(["a cat", "a drawing of a man firefighter medium skin tone", "x"])
    with torch.inference_mode():
        expected = F.normalize(model.encode_text(tokens), dim=-1)
        # fp32 sums in another order
        assert torch.allclose(encode_text(model, tokens), expected, atol=1e-5)


def test_a_folded_projection_embeds_like_one_with_standardisation_behind_it():
    torch.manual_seed(0)
    projection, standardise = torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4, affine=False)
    for _ in range(5):
        standardise(projection(torch.randn(32, 6) * 3 + 1))
    standardise.eval()
    inputs = torch.randn(8, 6)
    expected = standardise(projection(inputs))
    fold_standardisation(projection, standardise)
    # fp32 at values up to about 3
    assert torch.allclose(projection(inputs), expected, atol=1e-5)


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
    trainer = tiny_trainer("start")
    with torch.no_grad():
        trainer.words.vectors.weight.normal_()
    sums = trainer.embed_texts([f"thing {i}" for i in range(8)])
    start_as_a_sum(trainer.model, trainer.words)
    with torch.no_grad():
        embedded = encode_text(trainer.model, trainer.tokenizer([f"thing {i}" for i in range(8)]))
    # Not exact: attention is only nearly uniform and layer norms stand between. Chance would be 1 in 8.
    assert ((embedded @ sums.T).argmax(1) == torch.arange(8)).float().mean() >= 0.75


def test_a_whole_training_leaves_a_model_that_open_clip_loads(tiny_trainer, tmp_path):
    trainer = tiny_trainer("export")
    trainer.train_images(6, validate_every=6, save_every=6)
    trainer.train_texts()
    trainer.export()
    exported = build_model(json.loads((tmp_path / "export" / "open_clip_config.json").read_text()))
    weights = load_file(tmp_path / "export" / "open_clip_model.safetensors")
    assert all(t.dtype == torch.float16 for t in weights.values() if t.is_floating_point())
    exported.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        got = F.normalize(exported.eval().encode_image(trainer.normalise(images)), dim=-1)
        trainer.model.eval()
        # weights were stored in half precision
        assert torch.allclose(got, trainer.encode_images(images), atol=1e-2)
