"""`instar reward`: from comparisons to a model that scores texts, and that goes on where it was."""

import dataclasses
import itertools
import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import final_fingerprint, losses

from instar import load
from instar.data.preferences import Comparisons, PreferenceConfig
from instar.errors import UserError
from instar.generation.sampling import SamplingConfig
from instar.interchange.convert import ExportOptions, export_model
from instar.interchange.loading import load_language_model, open_model
from instar.models.reward_model import RewardModel
from instar.objectives.preference import ranking_loss
from instar.schema import build
from instar.sharding.mesh import AXES, MeshConfig, make_mesh
from instar.stages.reward import make_evaluation, make_loss, read_params, reward
from instar.stages.reward_batches import ComparisonBatches
from instar.stages.reward_config import NormaliseConfig, RewardConfig
from instar.stages.reward_normalise import demonstrations, sampler
from instar.stages.run import make_layout
from instar.training.batch import BatchConfig
from instar.training.step import accumulate

# Short, since the tokenizer of the small data set spells most words.
WORDS = "a e i o n t".split()


@pytest.fixture(scope="module", autouse=True)
def compiled_for_few_runs():
    yield


@pytest.fixture(scope="module")
def ratings(tmp_path_factory) -> pathlib.Path:
    """Short texts, of which people like those with an "n" and dislike those with an "o"."""
    folder, rng = tmp_path_factory.mktemp("ratings"), random.Random(0)
    with (folder / "ratings.jsonl").open("w") as file:
        for _ in range(120):
            said = rng.choices(WORDS, k=rng.randint(1, 4))
            rating = said.count("n") - said.count("o")
            raters = [rating + rng.choice((-1, 0, 1)) for _ in range(5)]
            record = {"prompt": "t", "completion": " " + " ".join(said), "rating": rating}
            file.write(json.dumps(record | {"raters": raters}) + "\n")
    return folder / "ratings.jsonl"


@pytest.fixture(scope="module")
def config(finished_run, ratings) -> RewardConfig:
    return build(
        {
            "parent": str(finished_run),
            "chat_template": "plain",
            "data": {
                "path": str(ratings),
                "kind": "ratings",
                "completions": 3,
                "max_length": 16,
                "group": "any",
            },
            "members": 2,
            "batch": {"size": 16},
            "epochs": 16,
            "optimizer": {"learning_rate": 2e-2},
            "checkpoint": {"minutes": None, "keep_steps": 20},
            "normalise": {"kind": "demonstrations", "path": str(ratings)},
            "evaluation": {"every": 20, "sets": {"same": str(ratings)}, "limit": 50},
        },
        RewardConfig,
    )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("reward") / "run"
    reward(config, str(folder))
    return folder


def read(ratings: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in ratings.read_text().splitlines()]


def test_it_learns_what_people_prefer(trained, ratings):
    # 16 epochs of 40 groups of 3, in batches of 16.
    assert max(losses(trained)) == 40
    records, model = read(ratings), load(trained)
    texts = [[record[name] for record in records] for name in ("prompt", "completion")]
    members = model.member_scores(*texts)
    values = np.asarray([record["rating"] for record in records])
    assert members.shape == (2, len(records)) and members.dtype == np.float64
    np.testing.assert_array_equal(model.score(*texts), members.mean(axis=0))
    assert np.abs(members[0] - members[1]).max() > 1e-2  # each drew its own groups
    for scores in members:
        gaps = np.subtract.outer(scores, scores)[np.subtract.outer(values, values) > 0]
        assert np.mean(gaps > 0) > 0.9
    # The texts of `normalise` are all of these.
    np.testing.assert_allclose(members.mean(axis=1), 0, atol=1e-4)


def test_scores_measured_from_a_policy_s_samples(config, trained, finished_run, ratings, tmp_path):
    """The samples, drawn again, have mean 0 and standard deviation 1 for each member."""
    sampling = SamplingConfig(max_new_tokens=6)
    normalise = NormaliseConfig("samples", str(ratings), str(finished_run), sampling, count=24)
    changes = {"parent": str(trained), "members": None, "steps": 1, "chat_template": None}
    reward(dataclasses.replace(config, normalise=normalise, **changes), str(tmp_path / "run"))
    model = load(tmp_path / "run")
    ids = [model.encoder.prompt("t")] * 24
    drawn = load(finished_run).generate(ids, sampling=sampling, seed=config.seed)
    texts = [completion.text for completion in drawn]
    assert len(set(texts)) > 12
    short = [text for text in texts if len(model.encoder.whole("t", text)) <= 16]
    scores = model.member_scores(["t"] * len(short), short)
    np.testing.assert_allclose(scores.mean(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(scores.std(axis=1), 1, atol=1e-4)


def test_its_files_tell_what_it_is_worth(trained, finished_run):
    found = json.loads((trained / "reward.json").read_text())
    same = found["sets"]["same"]
    assert (found["members"], found["step"], same["texts"]) == (2, 40, 120)
    assert same["accuracy"]["low"] <= same["accuracy"]["value"] <= same["accuracy"]["high"]
    assert min(same["members"]) > 0.9 > same["person"] > 0.5
    page = (trained / "report.html").read_text()
    assert "Rated texts" in page and page.count('class="plot"') >= 5
    lines = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "eval/same/accuracy" in line] == [20, 40]
    lineage = json.loads((trained / "checkpoints" / "40" / "lineage" / "lineage.json").read_text())
    assert (lineage["stage"], lineage["parent"]["stage"]) == ("reward", "pretrain")


def test_rankings_are_learnt_from_and_judged_by(config, trained, tmp_path):
    """The accuracy is over the pairs of each prompt, as a user would count them."""
    rng, lines = random.Random(2), []
    for prompt in "aeion":
        completions = [" " + " ".join(rng.choices(WORDS, k=3)) for _ in range(4)]
        ranks = [text.count("o") - text.count("n") for text in completions]
        lines.append({"prompt": prompt, "completions": completions, "ranks": ranks})
    path = tmp_path / "rankings.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    changes = {
        "parent": str(trained),
        "chat_template": None,
        "data": PreferenceConfig(str(path), "rankings", 4, 16),
        "steps": 2,
        "normalise": NormaliseConfig(),
        "evaluation": dataclasses.replace(config.evaluation, sets={"same": str(path)}),
    }
    reward(dataclasses.replace(config, **changes), str(tmp_path / "run"))
    model, earned = load(tmp_path / "run"), []
    for line in lines:
        scores = model.score([line["prompt"]] * 4, line["completions"])
        for one, other in itertools.permutations(range(4), 2):
            if line["ranks"][one] < line["ranks"][other]:
                earned.append(float(scores[one] > scores[other]))
    found = json.loads((tmp_path / "run/reward.json").read_text())["sets"]["same"]
    assert len(earned) > 10 and found["texts"] == 20
    assert found["accuracy"]["value"] == pytest.approx(np.mean(earned))
    assert sum(each["pairs"] for each in found["by_gap"]) == len(earned)


def test_it_goes_on_bit_for_bit(trained, config, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "checkpoints" / "40")
    reward(config, str(again))
    assert len(json.loads((again / "run.json").read_text())["starts"]) == 2
    assert final_fingerprint(again, 40) == final_fingerprint(trained, 40)
    assert losses(again) == losses(trained)


def test_it_does_not_go_on_with_other_data(trained, config, ratings, tmp_path):
    again, content = tmp_path / "run", ratings.read_text()
    shutil.copytree(trained, again)
    ratings.write_text(content.replace('"rating": 1', '"rating": 2'))
    try:
        with pytest.raises(UserError, match=r"^data: no longer what the run in .* restore it"):
            reward(config, str(again))
    finally:
        ratings.write_text(content)


@pytest.mark.exhaustive
def test_devices_that_would_share_a_row_read_rows_of_their_own(trained, config, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "checkpoints" / "40")
    reward(dataclasses.replace(config, mesh=MeshConfig(fsdp=2, context=4)), str(again))
    facts = json.loads((again / "run.json").read_text())
    assert facts["mesh"] == dict.fromkeys(AXES, 1) | {"data": 4, "fsdp": 2}
    assert losses(again) == pytest.approx(losses(trained), rel=1e-3)


def test_a_run_begins_with_its_parents_parameters(trained, config, finished_run):
    """A reward model's with their heads; a language model's body, under heads that differ."""
    model, mesh = RewardModel(load(trained).spec, 2), make_mesh(MeshConfig(), jax.devices()[:1])
    further = read_params(config, open_model(trained), model, mesh)
    jax.tree.map(np.testing.assert_array_equal, further, load(trained).params)
    first = read_params(config, open_model(finished_run), model, mesh)
    body = {name: x for name, x in load(finished_run).params.items() if name != "head"}
    heads = [first[name].pop("score_head")["kernel"] for name in ("member_0", "member_1")]
    for name in ("member_0", "member_1"):
        jax.tree.map(np.testing.assert_array_equal, first[name], body)
    assert np.abs(heads[0] - heads[1]).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"chat_template": None}, "has no chat template of its own: set chat_template"),
        ({"chat_template": "plane"}, "there is none named 'plane'"),
        ({"parent": "TRAINED", "chat_template": None, "members": 3}, "leave members out"),
        ({"batch": BatchConfig(3)}, "make batch.microbatch a multiple"),
        ({"data.max_length": 17}, "exceeds the 16 positions"),
        ({"data.path": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"evaluation.baseline": ("gone.jsonl",)}, "gone.jsonl does not exist: check evaluation"),
    ],
)
def test_what_does_not_fit_is_refused(config, trained, tmp_path, changes, sentence):
    for name, value in changes.items():
        value = str(trained) if value == "TRAINED" else value
        section, _, field = name.rpartition(".")
        if section:
            value = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section or field: value})
    with pytest.raises(UserError, match=sentence):
        reward(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_is_left_out_of_its_files_is_told(config, trained, finished_run, tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    rating = {"prompt": "t", "completion": " n", "rating": 1}
    kept = [rating | {"completion": f" {word}", "rating": place} for place, word in enumerate("no")]
    broken = [{"prompt": "t"}, {"prompt": ["t"]}]
    lines = [*kept, *broken, rating | {"prompt": "a e i o " * 9}]
    path.write_text("\n".join(map(json.dumps, lines)))
    data, sets = dataclasses.replace(config.data, path=str(path)), {"some": str(path)}
    evaluation = dataclasses.replace(config.evaluation, sets=sets)
    changed = dataclasses.replace(config, data=data, evaluation=evaluation, batch=BatchConfig(3))
    with pytest.raises(UserError, match=r"batch\.microbatch"):
        reward(changed, str(tmp_path / "run"))
    assert "left out: 2 records broken, 1 text too long" in (told := capsys.readouterr().err)
    assert told.startswith("data: 5 records") and f"record 3 of {path} (completion is" in told
    encoder, mesh = load(trained).encoder, make_mesh(MeshConfig(), jax.devices()[:1])
    make_evaluation(changed, encoder, None)
    assert "evaluation.sets.some: 5 records, 2 texts; left out: 2" in capsys.readouterr().err
    normalise = NormaliseConfig("demonstrations", str(path))
    demonstrations(normalise, encoder, 16)
    assert "normalise.path: 5 records, 2 texts; left out: 2" in capsys.readouterr().err
    sampler(normalise, open_model(finished_run), encoder, mesh, 16, 0)
    assert "normalise.path: 5 records, 3 prompts; left out: 1" in capsys.readouterr().err


def test_a_reward_model_is_no_language_model(trained, tmp_path):
    with pytest.raises(UserError, match="is a reward model, which scores texts and generates no"):
        load_language_model(trained)
    for member in (None, 2, -1):
        with pytest.raises(UserError, match="is a reward model of 2, and a folder holds one: give"):
            export_model(ExportOptions(str(trained), str(tmp_path / "exported"), member=member))
    assert not (tmp_path / "exported").exists()


def test_a_member_leaves_as_a_folder_and_is_trained_on(trained, config, ratings, tmp_path):
    """With the bias that `normalise` gave it, and with the stage of any import."""
    export_model(ExportOptions(str(trained), str(tmp_path / "folder"), member=1))
    ours, theirs = load(trained), load(tmp_path / "folder")
    records = read(ratings)[:20]
    texts = [[record[name] for record in records] for name in ("prompt", "completion")]
    np.testing.assert_array_equal(theirs.score(*texts), ours.member_scores(*texts)[1])
    parent = open_model(tmp_path / "folder")
    assert (parent.lineage["stage"], parent.card.members) == ("import", 1)
    changes = {"parent": str(tmp_path / "folder"), "chat_template": None, "members": None}
    settings = dataclasses.replace(config, steps=1, normalise=NormaliseConfig(), **changes)
    reward(settings, str(tmp_path / "run"))
    further = load(tmp_path / "run")
    assert further.card.members == 1
    # One step from its parameters, and not from fresh ones.
    rate = settings.optimizer.learning_rate
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), further.params["member_0"], ours.params["member_1"]
    )
    assert 0 < max(jax.tree.leaves(moved)) < 1.2 * rate


@pytest.mark.parametrize("group", ["any", "prompt"])
def test_a_run_compiles_one_program_for_batches_that_differ(config, trained, tmp_path, group):
    """Their texts fill now more rows and now fewer, and little of a row is empty all the same."""
    rng, lines = random.Random(1), []
    for number in range(200):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
        for rating in range(3):
            completion = " " + " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
            record = {"prompt": f"{number % 10} {prompt}", "completion": completion}
            lines.append(json.dumps(record | {"rating": rating}))
    (tmp_path / "ratings.jsonl").write_text("\n".join(lines))
    data = PreferenceConfig(str(tmp_path / "ratings.jsonl"), "ratings", 3, 32, group)
    comparisons, batch = Comparisons.open(data, load(trained).encoder), BatchConfig(16)
    layout = make_layout(batch, make_mesh(MeshConfig(), jax.devices()[:1]))
    batches = ComparisonBatches(comparisons, batch, layout, members=2, seed=0, row_length=32)
    segments = [
        np.asarray(next(batches(0, {"group": 16 * number, "tokens": 0}))[0]["segment_ids"])
        for number in range(100)
    ]
    needed = {int((each[0].any(axis=-1)).sum(axis=0).max()) for each in segments}
    assert len(needed) > 3 and len({each.shape for each in segments}) == 1
    assert np.mean(np.stack(segments) > 0) > 0.7


def test_the_loss_is_that_of_each_text_alone(config, trained):
    """Packing and microbatches change nothing: each member's loss and gradient are its own.

    So are the margins of its pairs, which grow with the gap of their ratings.
    """
    model, loaded = RewardModel(load(trained).spec, 2), load(trained)
    params = jax.tree.map(np.asarray, loaded.params)
    data = PreferenceConfig(config.data.path, "ratings", 3, 16, "any")
    comparisons = Comparisons.open(data, loaded.encoder)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def batch_of(microbatch: int) -> dict:
        batch = BatchConfig(8, microbatch)
        layout = make_layout(batch, mesh)
        batches = ComparisonBatches(comparisons, batch, layout, members=2, seed=5, row_length=16)
        placed, position = next(batches(0, {"group": 3, "tokens": 0}))
        drawn = comparisons.batch(5, 3, 8), comparisons.batch(6, 3, 8)
        assert position == {"group": 11, "tokens": sum(b["lengths"].sum() for b in drawn)}
        return placed

    def expected(params: dict) -> jax.Array:
        each = []
        for member in range(2):
            drawn = comparisons.batch(5 + member, 3, 8)
            scores = model.scores(
                params, jnp.asarray(drawn["tokens"].reshape(24, 16)), drawn["lengths"].reshape(24)
            )[member]
            ranks = drawn["ranks"]
            gaps = np.abs(ranks[:, :, None] - ranks[:, None, :])
            margin, doubt = 0.1 + 0.5 * gaps, 1 / (1 + np.exp(gaps / 2))
            scores, mask = scores.reshape(8, 3), drawn["mask"]
            loss, stats = ranking_loss(scores, ranks, mask, margin, doubt=doubt)
            each.append(loss * stats["prompts"])
        return sum(each)

    loss = make_loss(model, dataclasses.replace(config, margin=0.1, gap_margin=0.5, gap_noise=2.0))
    run = jax.jit(lambda params, batch: accumulate(loss, params, None, batch, jax.random.key(0)))
    value, gradient = jax.jit(jax.value_and_grad(expected))(params)
    for microbatch in (8, 4):
        found, sums = run(params, batch_of(microbatch))
        np.testing.assert_allclose(2 * sums["loss"], value, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), found, gradient
        )
