"""Two looks keep every promise of one: masked equals sparse, batch mates, MACs, caps, budgets, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from vits import lively, pictures, relative, vit

from miaformer import MIAFormer
from miaformer.data import Batch
from miaformer.evaluation.calibration import View, calibrate, choose_looks, leaving_views
from miaformer.model.budget import Calibration
from miaformer.model.early_exit import ASKING, NEVER, EarlyExit, asking_macs, exit_blocks, left_at, macs_of_leaving
from miaformer.model.looks import STEP, Looks, row_of
from miaformer.model.policy import AnyPolicy, Full, Look, TwoLooks


def looking(seed: int = 0, exits: bool = False, **config: object) -> MIAFormer:
    """A small calibrated model that looks again at about half of the images, at a budget of 0.5.

    exits: about a quarter leave their first look early.
    """
    model = lively(seed, looks=2, **config)
    images = pictures(model.backbone, 48, seed=9)
    labels = torch.zeros(48, dtype=torch.int64)
    calibrate(model, [Batch(images, labels, labels)])
    assert model.calibration is not None
    least, most = model.calibration.range
    first, second = least + 0.05, most - 0.05
    if model.adapt_config.chooses_resolution:
        first, second = model.calibration.fractions[-1], model.calibration.fractions[1]
    leave = NEVER
    with torch.no_grad():
        logits = model.run(images, policy=one_look(model, first)).logits
        if exits:
            asking = EarlyExit(model.backbone, ASKING)
            model.run(images, policy=Look(asking, (model.image_sizes()[-1],)))
            leave = float(torch.stack(asking.answers).softmax(dim=2).amax(dim=2).quantile(0.75))
    middle = min(float(logits.softmax(dim=1).amax(dim=1).median()), leave)
    rows = tuple(Looks(budget, first, second, middle, leave) for budget in (0.5, 0.6))
    model.calibration = replace(model.calibration, looks=rows)
    return model


def one_look(model: MIAFormer, fraction: float) -> AnyPolicy:
    if not model.adapt_config.chooses_resolution:
        price = model.price_of(fraction)
        assert isinstance(price, float)
        return model.learned(price)
    assert model.calibration is not None
    return Look(Full(), (model.image_sizes()[model.calibration.nearest(fraction)],))


SIZES: dict[str, object] = {"grains": ("resolution",)}
EXITS: dict[str, object] = {"exits": True, **SIZES}
either = pytest.mark.parametrize("config", [{}, SIZES, EXITS], ids=["prices", "sizes", "exits"])


@pytest.mark.parametrize(
    "config", [{}, {"depth_choice": "nested", "token_choice": "even"}, {"mlp_width": "coupled"}, SIZES, EXITS]
)
def test_masked_equals_sparse(config: dict[str, object]) -> None:
    model = looking(**config)
    images = pictures(model.backbone, 12)
    sparse, masked = (model.run(images, budget=0.5, execution=one) for one in ("sparse", "masked"))  # type: ignore[arg-type]
    assert set(sparse.trace.looks.tolist()) == {1, 2}
    assert relative(sparse.logits, masked.logits) < 1e-4
    for name in ("depth", "heads", "tokens", "macs", "looks", "grid"):
        assert torch.equal(getattr(sparse.trace, name), getattr(masked.trace, name))


@either
def test_an_image_does_not_depend_on_its_batch_mates_or_their_budgets(config: dict[str, object]) -> None:
    model = looking(**config)
    images = pictures(model.backbone, 10)
    budgets = [0.5, 0.6, 0.3, 0.5, 0.8, 0.6, 0.5, 0.5, 0.4, 0.5]  # some of them are spent in one look
    together = model.run(images, budget=budgets)
    for index, budget in enumerate(budgets):
        alone = model.run(images[index : index + 1], budget=budget)
        assert relative(alone.logits, together.logits[index : index + 1]) < 1e-4
        assert int(alone.trace.macs) == int(together.trace.macs[index])
        assert int(alone.trace.looks) == int(together.trace.looks[index])
    assert together.trace.looks[[2, 4, 8]].tolist() == [1, 1, 1]
    assert 2 in together.trace.looks.tolist()


@either
def test_the_second_look_is_taken_where_the_first_answer_is_not_confident(config: dict[str, object]) -> None:
    model = looking(**config)
    images = pictures(model.backbone, 16)
    assert model.calibration is not None
    row = model.calibration.looks[0]
    first, second = model.run(images, policy=_first(model)), model.run(images, policy=one_look(model, row.second))
    both = model.run(images, budget=0.5)
    again = first.logits.softmax(dim=1).amax(dim=1) < row.confidence
    assert torch.equal(both.trace.looks == 2, again)
    assert relative(both.logits, torch.where(again[:, None], second.logits, first.logits)) < 1e-5
    assert torch.equal(both.trace.macs, first.trace.macs + again * second.trace.macs)
    assert torch.equal(both.trace.tokens[again], second.trace.tokens[again])
    assert torch.equal(both.trace.grid, torch.where(again[:, None], second.trace.grid, first.trace.grid))


@either
def test_reported_macs_are_executed(config: dict[str, object]) -> None:
    model = looking(**config)
    images = pictures(model.backbone, 6)
    assert model.calibration is not None
    model.run(images, budget=0.5)  # what is prepared once does not count
    with FlopCounterMode(display=False) as counter:
        output = model.run(images, budget=0.5)
    assert 2 in output.trace.looks.tolist()
    assert counter.get_total_flops() == 2 * int(output.trace.macs.sum())


def test_images_leave_a_look_whose_early_answer_is_confident() -> None:
    """With that answer, for what its blocks took; and they are not looked at again."""
    model = looking(**EXITS)
    images = pictures(model.backbone, 24)
    assert model.calibration is not None
    row, size = model.calibration.looks[0], model.image_sizes()[-1]
    asking = EarlyExit(model.backbone, ASKING)
    to_its_end = model.run(images, policy=Look(asking, (size,)))
    answers = torch.stack([*asking.answers, to_its_end.logits], dim=1)
    output = model.run(images, budget=0.5)
    left = left_at(answers.softmax(dim=2).amax(dim=2), row.leave)
    once = output.trace.looks == 1
    assert (once & (left == 0)).any()
    assert (once & (left == 1)).any()
    assert (left[~once] == 1).all()
    assert relative(output.logits[once], answers[torch.arange(24), left][once]) < 1e-5
    macs = torch.tensor(macs_of_leaving(model.cost(size), asking.blocks))
    assert torch.equal(output.trace.macs[once], macs[left][once])
    assert torch.equal(
        output.trace.depth[once].sum(dim=1), torch.tensor([*asking.blocks, model.cost().depth])[left][once]
    )


@settings(deadline=None, max_examples=60)
@given(st.floats(0.0, 1.0), st.integers(0, 5), st.sampled_from(["prices", "sizes", "exits"]))
def test_no_cap_is_exceeded_and_a_second_look_is_worth_it(share: float, seed: int, kind: str) -> None:
    model = MODELS[kind]
    least = (model.least_macs() + 1) / model.cost().backbone
    cap = min(least + share * (1 - least), 1.0)
    output = model.run(pictures(model.backbone, 8, seed=seed), budget=0.5, cap=cap)
    assert (output.trace.macs <= cap * model.cost().backbone).all()
    first = model.run(pictures(model.backbone, 8, seed=seed), policy=_first(model), cap=cap)
    twice = output.trace.looks == 2
    assert (output.trace.macs[twice] > first.trace.macs[twice]).all()
    assert torch.equal(output.logits[~twice], first.logits[~twice])


def _first(model: MIAFormer):  # type: ignore[no-untyped-def]
    policy = model.at_budget(0.5)
    assert isinstance(policy, TwoLooks)
    return policy.first


MODELS = {"prices": looking(), "sizes": looking(**SIZES), "exits": looking(**EXITS)}


@either
def test_saved_and_loaded_it_looks_the_same(tmp_path: Path, config: dict[str, object]) -> None:
    model = looking(**config).float()
    model.save_pretrained(tmp_path / "model")
    loaded = MIAFormer.from_pretrained(tmp_path / "model")
    assert loaded.calibration == model.calibration
    images = pictures(model.backbone, 8).float()
    one, other = model.run(images, budget=0.5), loaded.run(images, budget=0.5)
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.trace.looks, other.trace.looks)


def test_a_table_of_before_is_read() -> None:
    table = Calibration((1.0, 2.0), (0.8, 0.4), 10)
    content = table.to_json()
    del content["looks"]
    assert Calibration.from_json(content) == table


@pytest.mark.parametrize("config", [{"depth_choice": "nested"}, SIZES, EXITS], ids=["prices", "sizes", "exits"])
def test_an_exported_file_looks_as_often(config: dict[str, object], tmp_path: Path) -> None:
    from miaformer.export import export_onnx, open_session, run_session

    model = looking(**config).float()
    export_onnx(model, tmp_path / "model.onnx", trace=True)
    session = open_session(tmp_path / "model.onnx", 1)
    for cap in (4.0, 0.9, 0.7):
        spent = set()
        for image in pictures(model.backbone, 10).float():
            found = run_session(session, image[None].numpy(), 0.5, cap)
            wanted = model.run(image[None], budget=0.5, cap=cap if cap < 1 else None)
            assert relative(torch.from_numpy(found["logits"]), wanted.logits) < 1e-4
            assert float(found["macs_fraction"][0]) == pytest.approx(float(wanted.trace.macs_fraction), abs=1e-5)
            for name in ("depth", "heads", "tokens", "macs", "looks"):
                assert torch.equal(torch.from_numpy(found[name]), getattr(wanted.trace, name))
            spent.add(int(wanted.trace.looks))
        assert spent == {1, 2}


def test_early_answers_are_paid_for_within_the_cap(tmp_path: Path) -> None:
    """At caps that pay for a size, for all early answers too, and for two MACs less; in PyTorch and in a file."""
    from miaformer.export import export_onnx, open_session, run_session

    model = looking(**EXITS, settings={"num_classes": 60}).float()
    cost, images = model.cost(), pictures(model.backbone, 6).float()
    table = model.calibration
    assert table is not None
    model.calibration = replace(table, looks=tuple(replace(row, first=table.fractions[-2]) for row in table.looks))
    export_onnx(model, tmp_path / "model.onnx", trace=True)
    session = open_session(tmp_path / "model.onnx", 1)
    asking = asking_macs(cost, exit_blocks(cost.depth))
    first = model.run(images, policy=_first(model)).trace.macs
    asked = set()
    for size in sorted(model.macs_of_sizes().values())[:2]:
        for more in (0, asking - 2, asking):
            cap = (size + more + 0.5) / cost.backbone
            for place, image in enumerate(images.split(1)):
                wanted = model.run(image, budget=0.5, cap=cap)
                assert int(wanted.trace.macs) <= size + more
                found = run_session(session, image.numpy(), 0.5, cap)
                assert int(found["macs"][0]) == int(wanted.trace.macs)
                asked.add((size == model.least_macs(), more == asking, int(wanted.trace.macs) == int(first[place])))
    assert (False, True, True) in asked
    assert (False, False, True) not in asked, "nobody is asked in a size where that cannot be paid"


def test_a_weight_lies_in_the_innermost_branch_that_holds_its_readers(tmp_path: Path) -> None:
    """ONNX Runtime arranges it for its products only there."""
    import onnx

    from miaformer.export import export_onnx

    export_onnx(looking(**EXITS).float(), tmp_path / "model.onnx")
    checked = 0

    def readers(graph: onnx.GraphProto, name: str) -> int:
        """One for the graph's own nodes, and one for each branch that reads it."""
        branches = [one.g for node in graph.node for one in node.attribute if one.type == onnx.AttributeProto.GRAPH]
        return any(name in node.input for node in graph.node) * 2 + sum(readers(one, name) > 0 for one in branches)

    def check(graph: onnx.GraphProto) -> None:
        nonlocal checked
        for weight in graph.initializer:
            assert readers(graph, weight.name) >= 2, weight.name
            checked += 1
        for node in graph.node:
            for one in node.attribute:
                if one.type == onnx.AttributeProto.GRAPH:
                    check(one.g)

    proto = onnx.load(tmp_path / "model.onnx")
    check(proto.graph)
    assert checked > len(proto.graph.initializer), "some lie in branches"


# Which looks ---------------------------------------------------------------------------------------------------------


def views(n: int = 400, seed: int = 0, helpful: bool = True) -> list[View]:
    """Single looks that are right more often the dearer they are. helpful: whether their confidence tells when."""
    rng = np.random.default_rng(seed)
    hard, noise = rng.random(n), rng.random(n)
    found = []
    for fraction in np.linspace(0.1, 0.9, 17):
        right = hard < 0.75 + 0.27 * fraction
        confidence = np.where(right, 0.6, 0.1) + 0.4 * noise if helpful else noise
        macs = np.full(n, fraction)
        found.append(View(float(fraction), macs, np.where(right, 0, 1), confidence, to_its_end=float(fraction)))
    return found


def spent(looks: Looks, found: list[View]) -> tuple[float, float]:
    """Mean MACs and agreement with the dearest look, by the definition."""
    first, second = (min(found, key=lambda view: abs(view.fraction - one)) for one in (looks.first, looks.second))
    again = first.confidence < looks.confidence
    answer = np.where(again, second.answer, first.answer)
    return float((first.macs + again * second.macs).mean()), float((answer == found[-1].answer).mean())


@given(st.integers(0, 20))
def test_the_looks_chosen_spend_their_budget_and_beat_one_look(seed: int) -> None:
    found = views(seed=seed)
    table = choose_looks(found)
    assert table
    for looks in table:
        macs, agreement = spent(looks, found)
        assert abs(macs - looks.budget) <= max(STEP / 2, looks.second / 400) + 1e-9
        single = np.interp(
            looks.budget, [v.fraction for v in found], [(v.answer == found[-1].answer).mean() for v in found]
        )
        assert agreement > single


@given(st.integers(0, 20))
def test_looks_that_images_leave_spend_their_budget_and_beat_looks_to_the_end(seed: int) -> None:
    """Of three sizes, with two early answers each that are right less often and say so."""
    generator = torch.Generator().manual_seed(seed)
    n, whole = 400, (0.9, 0.5, 0.2)
    hard = torch.rand(n, generator=generator)
    answers, macs, found = {}, {}, []
    for fraction in whole:
        each = []
        for share in (0.5, 0.75, 1.0):
            knows = hard < 0.5 + 0.3 * share + 0.2 * fraction
            sure = torch.where(knows, 2.0, 0.5) + torch.rand(n, generator=generator)
            each.append(torch.nn.functional.one_hot(torch.where(knows, 0, 1), 3) * sure[:, None])
        answers[fraction] = torch.stack(each, dim=1)
        macs[fraction] = torch.tensor([0.5, 0.75, 1.0]).double() * fraction
        found.append(View.of(each[-1], torch.full((n,), fraction).double()))
        found += leaving_views(found[-1].fraction, answers[fraction], macs[fraction])
    last = {fraction: each[:, -1].argmax(dim=1) for fraction, each in answers.items()}

    def right(given: torch.Tensor) -> float:
        return float((given == last[whole[0]]).double().mean())

    table = choose_looks(found, between=False)
    assert table[0].budget < whole[-1]
    assert any(row.leave < NEVER for row in table)
    for row in table:
        first, second = (min(whole, key=lambda one, w=w: abs(one - w)) for w in (row.first, row.second))  # type: ignore[misc]
        left = left_at(answers[first].softmax(dim=2).amax(dim=2), row.leave)
        given = answers[first][torch.arange(n), left]
        again = given.softmax(dim=1).amax(dim=1) < row.confidence
        assert (left[again] == 2).all(), "who left early is not looked at again"
        spent = (macs[first][left] + again * second).mean()
        assert abs(float(spent) - row.budget) <= max(STEP / 2, second / n) + 1e-6
        single = [right(last[one]) for one in whole if one <= row.budget]
        assert right(torch.where(again, last[second], given.argmax(dim=1))) > max(single, default=0.0)


def test_where_confidence_says_nothing_there_is_one_look() -> None:
    assert len(choose_looks(views(helpful=False))) <= 3  # of 160 budgets


def test_a_row_is_for_budgets_near_it() -> None:
    rows = [Looks(0.3, 0.2, 0.8, 0.5), Looks(0.4, 0.2, 0.8, 0.6)]
    assert row_of(rows, 0.3 + STEP / 2) is rows[0]
    assert row_of(rows, 0.3 + STEP) is None
    assert row_of(rows, 0.4) is rows[1]
    assert row_of([], 0.4) is None


def test_calibration_chooses_looks_only_where_the_model_may_look_twice() -> None:
    for looks in (1, 2):
        model = lively(0, looks=looks)
        images = pictures(model.backbone, 64, seed=2)
        labels = torch.zeros(64, dtype=torch.int64)
        table = calibrate(model, [Batch(images, labels, labels)])
        assert looks == 2 or table.looks == ()
        for row in table.looks:
            spent = model.run(images, budget=row.budget).trace.macs_fraction.mean()
            assert float(spent) == pytest.approx(row.budget, abs=0.02)


def test_images_leave_between_blocks_of_a_classifier() -> None:
    model = lively(0)
    for blocks in ((0,), (1, 9)):
        with pytest.raises(ValueError, match="images leave before blocks 1 to"):
            EarlyExit(model.backbone, 0.5, blocks)
    assert EarlyExit(model.backbone, 0.5, (2, 1, 2)).blocks == (1, 2)
    with pytest.raises(ValueError, match="EarlyExit needs a classifier"):
        EarlyExit(vit(num_classes=0), 0.5)


def test_below_the_smallest_size_the_next_row_down_counts() -> None:
    rows = [Looks(0.10, 0.3, 0.8, 0.5, 0.6), Looks(0.15, 0.3, 0.8, 0.5, 0.7), Looks(0.4, 0.3, 0.8, 0.6)]
    assert row_of(rows, 0.13, least=0.3) is rows[0]
    assert row_of(rows, 0.09, least=0.3) is rows[0]
    assert row_of(rows, 0.29, least=0.3) is rows[1]
    assert row_of(rows, 0.31, least=0.3) is None
    assert row_of(rows, 0.401, least=0.3) is rows[2]
    assert row_of([], 0.1, least=0.3) is None


def test_looks_are_one_or_two() -> None:
    with pytest.raises(ValueError, match="looks=3 must be 1 or 2"):
        lively(0, looks=3)
