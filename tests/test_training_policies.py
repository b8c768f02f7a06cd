"""Training's gates mean what inference's do, and their gradients are those of the objective."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from tiny_training import RECIPE, Quadrants, tiny_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from miaformer import MIAFormer
from miaformer.data import Batches, build_transform
from miaformer.engine.controller import LOG_PRICE_RANGE
from miaformer.engine.decisions import Decisions
from miaformer.engine.masked import Masked
from miaformer.lab.baselines import OBJECTIVES as BASELINES
from miaformer.model.policy import Fixed
from miaformer.training.objective import Step
from miaformer.training.policies import SURVIVAL, Draws, Leaving, Relaxed, Sampled, elastic_decisions
from miaformer.training.recipes import Stage
from miaformer.training.stages import OBJECTIVES, Backbone, Elastic
from miaformer.training.tariff import Tariff

BATCH = 12


@pytest.fixture
def images() -> Tensor:
    transform = build_transform(tiny_model().data_config())
    batches = Batches(Quadrants("train"), transform, BATCH, seed=0, shuffle=False, drop_last=True)
    return next(iter(batches.epoch(0))).images


def deciding(seed: int = 0, backbone: dict[str, object] | None = None, **config: object) -> MIAFormer:
    """Controllers whose decisions differ between images, at all grains."""
    model = tiny_model(backbone or {}, first_token_block=0, **config).eval()
    generator = torch.Generator().manual_seed(seed)
    for controller in model.controllers:
        for layer in (controller.gates, controller.query) if controller.rank else (controller.gates,):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * 3
        controller.gates.bias.data -= 3
        if controller.rank:
            controller.query.bias.data[-1] -= 3
    return model


def draws(model: MIAFormer, seed: int = 0, full_share: float = 0.0, batch: int = BATCH) -> Draws:
    generator = torch.Generator().manual_seed(seed)
    return Draws.of_step(generator, batch, model.cost(), full_share, (0.3, 0.9), slice(0, batch))


@pytest.mark.parametrize("head_choice", ["nested", "subset"])
@pytest.mark.parametrize("token_scope", ["progressive", "per_block"])
def test_relaxed_without_noise_decides_as_inference_does(head_choice: str, token_scope: str, images: Tensor) -> None:
    model = deciding(head_choice=head_choice, token_scope=token_scope)
    cost, log_prices = model.cost(), torch.full((BATCH,), 0.3)
    x, steps = model.walk(
        model.embed(images), Relaxed(model.controllers, log_prices, draws(model), 0.0), Masked(cost), cost
    )
    greedy = model.run(images, price=float(log_prices[0].exp()))
    assert 0.05 < greedy.trace.depth.float().mean() < 0.95
    torch.testing.assert_close(steps.macs.long(), greedy.trace.macs, rtol=1e-6, atol=2)
    logits = model.backbone.forward_head(model.backbone.norm(x))
    torch.testing.assert_close(logits, greedy.logits, rtol=1e-4, atol=1e-4)


def test_images_marked_full_execute_everything(images: Tensor) -> None:
    model = deciding()
    cost, drawn = model.cost(), draws(model, full_share=0.5)
    for policy in (
        Relaxed(model.controllers, torch.full((BATCH,), 2.0), drawn, 1.0),
        Sampled(model.controllers, torch.full((BATCH,), 2.0), drawn, 1.0, cost, True),
    ):
        x, _ = model.walk(model.embed(images), policy, Masked(cost), cost)
        logits = model.backbone.forward_head(model.backbone.norm(x))
        torch.testing.assert_close(logits[drawn.full], model.backbone(images)[drawn.full])
        assert not torch.allclose(logits[~drawn.full], model.backbone(images)[~drawn.full], atol=1e-3)


def test_gradients_reach_every_grain_from_loss_and_from_cost(images: Tensor) -> None:
    model = deciding()
    cost = model.cost()
    policy = Relaxed(model.controllers, torch.zeros(BATCH), draws(model), 1.0)
    x, steps = model.walk(model.embed(images), policy, Masked(cost), cost)
    logits = model.backbone.forward_head(model.backbone.norm(x))
    for objective in (logits.logsumexp(dim=1).sum(), (steps.macs / cost.backbone).sum()):
        model.zero_grad()
        objective.backward(retain_graph=True)
        for controller in model.controllers:
            assert controller.gates.weight.grad[0].abs().sum() > 0
            assert controller.gates.weight.grad[2:].abs().sum() > 0
            assert controller.query.weight.grad.abs().sum() > 0
            assert all(p.grad is None or p.grad.isfinite().all() for p in controller.parameters())


def test_log_probability_is_that_of_the_decisions_sampled(images: Tensor) -> None:
    """Summed over all outcomes of a model with two blocks' depth gates free, probabilities are 1."""
    model = deciding()
    for controller in model.controllers:  # heads and tokens certain: only depth is left to chance
        controller.gates.weight.data[1:] = 0
        controller.gates.bias.data[1:] = 60
        controller.query.weight.data.zero_()
        controller.query.bias.data[-1] = 60
    cost, base = model.cost(), draws(model)
    start = model.embed(images)
    total = torch.zeros(BATCH)
    for outcome in product([1e-6, 1 - 1e-6], repeat=cost.depth):
        drawn = replace(base, depth=torch.tensor(outcome).expand(BATCH, -1))
        policy = Sampled(model.controllers, torch.full((BATCH,), -3.0), drawn, 1.0, cost, True)
        model.walk(start, policy, Masked(cost), cost)
        total += policy.log_prob.exp().detach()
    torch.testing.assert_close(total, torch.ones(BATCH), rtol=2e-2, atol=2e-2)


def test_expected_cost_is_the_mean_over_samples(images: Tensor) -> None:
    model = deciding()
    for controller in model.controllers[1:]:  # later blocks see what earlier ones did; the first does not
        controller.gates.weight.data.zero_()
        controller.query.weight.data.zero_()
        controller.query.bias.data[:-1] = 0
    cost, log_prices = model.cost(), torch.full((BATCH,), 0.5)
    start, spent, expected = model.embed(images), torch.zeros(BATCH), torch.zeros(BATCH)
    repeats = 300
    with torch.no_grad():
        for seed in range(repeats):
            policy = Sampled(model.controllers, log_prices, draws(model, seed), 1.0, cost, True)
            _, steps = model.walk(start, policy, Masked(cost), cost)
            blocks = sum(cost.of_host(i, g) for i, g in enumerate(steps.gates))
            spent += torch.from_numpy(blocks / cost.backbone / repeats)
            expected += policy.expected_macs / cost.backbone / repeats
    # Products of gates (attention's square, heads by tokens) are taken at their means: a little off, not more.
    torch.testing.assert_close(spent.mean(), expected.mean(), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("pool", [{}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("kind", ["supervised", "reinforce"])
def test_leaving_by_chance_is_the_mean_over_leaving_for_sure(
    kind: str, pool: dict[str, object], images: Tensor
) -> None:
    """Loss, MACs, and the gradient of both: the mean over the blocks to leave after, by their probabilities."""
    model = deciding(backbone=pool, depth_choice="nested", grains=("depth",))
    cost, backbone = model.cost(), model.backbone
    labels = torch.eye(4)[torch.arange(BATCH) % 4]
    log_prices, values, temperature = torch.full((BATCH,), 0.5), torch.full((BATCH,), 0.7), 2.0
    drawn = draws(model, full_share=0.25)
    step = Step(drawn, replace(draws(model, 1), full=drawn.full), log_prices, values, (0.0, 1.0), temperature)
    stage = Stage(kind, epochs=1, lr=0, temperature=(temperature, temperature))
    outcome = OBJECTIVES[kind](model, stage, RECIPE, None)(images, labels, step)
    told, difficulties = _told_apart(model, images, log_prices)

    losses, macs = [], []
    for leave in range(cost.depth + 1):
        decisions = Decisions.full(BATCH, cost.depth, cost.num_heads, cost.num_patches)
        decisions.depth[:, leave:] = False
        x, steps = model.walk(model.embed(images), Fixed(decisions), Masked(cost), cost)
        losses.append(cross_entropy(backbone.forward_head(backbone.norm(x)), labels, reduction="none"))
        macs.append(steps.macs)
    goes_on = torch.where(drawn.full[:, None], 1.0, torch.sigmoid(told / temperature))
    survival = torch.cat([torch.ones(BATCH, 1), goes_on.cumprod(dim=1), torch.zeros(BATCH, 1)], dim=1)
    assert survival[:, 1:-1].min() > SURVIVAL
    probability = survival[:, :-1] - survival[:, 1:]
    task = (probability * torch.stack(losses, dim=1)).sum(dim=1)
    spent = (probability * torch.stack(macs, dim=1)).sum(dim=1) / cost.backbone
    torch.testing.assert_close(outcome.task_loss, task.detach())
    assert (spent < 0.9).any()
    contexts = sum(c.context_macs for c in model.controllers) / cost.backbone
    torch.testing.assert_close(outcome.macs_fraction, (spent + contexts).detach())

    if kind == "supervised":  # difficulty is what leaving now would lose
        targets = torch.stack(losses[:-1], dim=1).log().clamp(-3, 3)
        off = 0.1 * (difficulties - targets).square().sum(dim=1)
        torch.testing.assert_close(
            outcome.loss, (task + values * outcome.macs_fraction * ~drawn.full + off).mean(), rtol=1e-4, atol=1e-5
        )

    wanted = torch.autograd.grad((task + values * spent * ~drawn.full).mean(), [model.controllers[1].gates.bias])
    model.zero_grad(set_to_none=True)
    outcome.loss.backward()
    torch.testing.assert_close(model.controllers[1].gates.bias.grad[:1], wanted[0][:1])


def _told_apart(model: MIAFormer, images: Tensor, log_prices: Tensor) -> tuple[Tensor, Tensor]:
    """Depth logits and predicted difficulties (B, L) of images that execute everything."""
    x, found, difficulties = model.embed(images).tokens, [], []
    for controller, block in zip(model.controllers, model.backbone.blocks, strict=True):
        everything = torch.ones(len(x), model.cost().num_patches, dtype=torch.bool)
        said = controller.logits(
            x.detach(), everything, model.num_prefix_tokens, log_prices, model.cost().grid, through_difficulty=True
        )
        difficulties.append(said.difficulty)
        found.append(said.depth)
        x = block(x)
    return torch.stack(found, dim=1), torch.stack(difficulties, dim=1)


def test_who_hardly_goes_on_is_not_executed() -> None:
    leaving, full = Leaving(), torch.tensor([False, False, True])
    logits = torch.tensor([4.0, -6.0, -6.0])
    assert leaving.execute(logits, 1.0, full).tolist() == [True, False, True]
    assert leaving.execute(logits, 1.0, full).tolist() == [True, False, True]
    probability = leaving.probabilities()
    torch.testing.assert_close(probability.sum(dim=1), torch.ones(3))
    assert probability[1].tolist() == [1, 0, 0]
    assert probability[2].tolist() == [0, 0, 1]
    p = torch.sigmoid(logits[0])
    torch.testing.assert_close(probability[0], torch.stack([1 - p, p * (1 - p), p * p]))


@pytest.mark.parametrize("kind", ["elastic", "cls-attention", "reinforce"])
def test_real_decisions_are_carried_out_sparse_where_nothing_else_drops(kind: str, images: Tensor) -> None:
    """And the objective is the masked one's."""
    stage = Stage(kind, epochs=1, lr=0, temperature=(0.5, 0.5))
    losses = {}
    for sizes in ({}, {"proj_drop_rate": 1e-12}):  # enough to have it executed masked
        model = tiny_model(sizes, first_token_block=0).train()
        rows = count_rows(model)
        drawn = draws(model, full_share=0.25)
        log_prices, values = torch.full((BATCH,), 3.0), torch.full((BATCH,), 0.1)
        step = Step(drawn, draws(model, seed=1), log_prices, values, (0.0, 1.0), 0.5)
        labels = torch.eye(4)[torch.arange(BATCH) % 4]
        outcome = {**OBJECTIVES, **BASELINES}[kind](model, stage, RECIPE, None)(images, labels, step)
        losses[bool(sizes)] = outcome.loss
        all_rows = BATCH * 17 * len(model.backbone.blocks) * (2 if kind == "reinforce" else 1)
        assert (sum(rows) == all_rows) is bool(sizes), kind
    torch.testing.assert_close(losses[False], losses[True])


def test_processes_share_gradients_of_blocks_that_no_image_executes(images: Tensor) -> None:
    model = tiny_model().train()
    model.controllers.requires_grad_(False)
    skipping = replace(draws(model), rates=torch.zeros(BATCH, 4), depth=torch.ones(BATCH, 3))
    stage = Stage("elastic", epochs=1, lr=0, keep=(0.0, 1.0, 1.0))
    nothing = torch.zeros(BATCH)
    step = Step(skipping, skipping, nothing, nothing, (0.0, 1.0), 1.0)
    labels = torch.eye(4)[torch.arange(BATCH) % 4]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shared = DistributedDataParallel(Elastic(model, stage, RECIPE, None))
        for _ in range(2):  # a second step is refused after one that left gradients out
            outcome = shared(images, labels, step)
            assert (outcome.macs_fraction < 0.1).all()
            outcome.loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in model.backbone.parameters())


def count_rows(model: MIAFormer) -> list[int]:
    """Filled, as blocks are executed, with the rows that enter their second norm."""
    rows: list[int] = []
    for block in model.backbone.blocks:
        block.norm2.register_forward_hook(lambda layer, args, out: rows.append(args[0].numel() // 32))
    return rows


def test_elastic_decisions_cover_the_range_and_keep_early_tokens() -> None:
    model = tiny_model()
    cost = model.cost()
    stage = Stage("elastic", epochs=1, lr=0, keep=(0.5, 0.25, 0.1))
    decisions = elastic_decisions(draws(model, full_share=0.25, batch=400), cost, stage, model.adapt_config)
    assert decisions.tokens[:, 0].all()
    kept = decisions.tokens[:, -1].float().mean(dim=1)
    assert kept.min() < 0.3
    assert (kept == 1).float().mean() > 0.2
    later = decisions.tokens[:, 1:] <= decisions.tokens[:, :-1]
    assert later.all(), "a token that left has come back"
    everything = decisions.depth.all(1) & decisions.heads.all(2).all(1) & decisions.tokens.all(2).all(1)
    assert everything.sum() >= 100


def test_elastic_decisions_are_made_of_what_controllers_decide() -> None:
    model = tiny_model(grains=("tokens",))
    stage = Stage("elastic", epochs=1, lr=0, keep=(0.5, 0.25, 0.1))
    decisions = elastic_decisions(draws(model, batch=200), model.cost(), stage, model.adapt_config)
    assert decisions.depth.all()
    assert decisions.heads.all()
    assert not decisions.tokens.all()


def test_elastic_images_leave_where_depth_is_nested_and_keep_tokens_evenly() -> None:
    model = tiny_model({"img_size": 32, "depth": 4}, depth_choice="nested", first_token_block=0, last_token_block=0)
    stage = Stage("elastic", epochs=1, lr=0, keep=(0.3, 1.0, 0.5))
    drawn = replace(draws(model, batch=200), rates=torch.rand(200, 4) * torch.tensor([1.0, 1.0, 0.0, 1.0]))
    decisions = elastic_decisions(drawn, model.cost(), stage, model.adapt_config)
    assert (decisions.depth[:, 1:] <= decisions.depth[:, :-1]).all()
    assert not decisions.depth.all()
    assert torch.equal(decisions.tokens, decisions.tokens[:, :1].expand_as(decisions.tokens)), "tokens left later"
    quarters = decisions.tokens[:, 0].float().reshape(-1, 2, 4, 2, 4).mean(dim=(2, 4))
    at_random = (torch.rand(200, 64) < 0.5).float().reshape(-1, 2, 4, 2, 4).mean(dim=(2, 4))
    assert abs(quarters.mean() - 0.5) < 0.02
    assert quarters.std() < 0.75 * at_random.std()


@pytest.mark.parametrize("pool", [{}, {"class_token": False, "global_pool": "avg"}])
def test_a_backbones_early_answers_are_those_after_the_block_drawn(pool: dict[str, object], images: Tensor) -> None:
    model = tiny_model({"depth": 5, **pool})
    backbone, labels = model.backbone.eval(), torch.eye(4)[torch.arange(BATCH) % 4]
    drawn, nothing = draws(model), torch.zeros(BATCH)
    step = Step(drawn, drawn, nothing, nothing, (0.0, 1.0), 1.0)
    stage = Stage("backbone", epochs=1, lr=0, early_weight=0.4)
    found = Backbone(model, stage, RECIPE, None)(images, labels, step).task_loss
    x, answers = model.embed(images).tokens, []
    for block in backbone.blocks:
        answers.append(cross_entropy(backbone.forward_head(backbone.norm(x)), labels, reduction="none"))
        x = block(x)
    after = 2 + (drawn.leaving * 3).long()  # of 5 blocks 2, 3 or 4
    assert set(after.tolist()) == {2, 3, 4}
    early = torch.stack(answers, dim=1)[torch.arange(BATCH), after]
    last = cross_entropy(backbone.forward_head(backbone.norm(x)), labels, reduction="none")
    torch.testing.assert_close(found, (last + 0.4 * early).detach())


def test_draws_do_not_depend_on_the_number_of_processes() -> None:
    model = tiny_model()

    def part(images: slice) -> Draws:
        return Draws.of_step(torch.Generator().manual_seed(5), 8, model.cost(), 0.25, (0.3, 0.9), images)

    whole, halves = part(slice(0, 8)), (part(slice(0, 4)), part(slice(4, 8)))
    for name in ("full", "budgets", "depth", "heads", "tokens", "rates", "shared", "leaving"):
        together = torch.cat([getattr(half, name) for half in halves])
        assert torch.equal(getattr(whole, name), together)
    assert len(whole.shared.unique()) == 1, "what the whole batch shares is one number in every process"


def test_tariff_brings_spending_to_the_budget() -> None:
    """Against a simulated model whose spending falls with the log-price, and drifts upwards while it learns."""
    tariff = Tariff((0.2, 1.0), price_rate=0.3)
    generator = torch.Generator().manual_seed(0)

    def spends(log_price: Tensor, drift: float) -> Tensor:
        return torch.sigmoid(1 + drift - log_price)

    tariff.start(lambda log_price: float(spends(torch.tensor(log_price), 0.0)))
    for step in range(400):
        budgets = 0.2 + 0.75 * torch.rand(32, generator=generator)
        spent = spends(tariff.log_prices(budgets), step / 200) + 0.1 * torch.randn(32, generator=generator)
        tariff.update(budgets, spent, None)
    asked = torch.linspace(0.25, 0.9, 10)
    assert (spends(tariff.log_prices(asked), 2.0) - asked).abs().max() < 0.05
    assert (tariff.log_price.diff() <= 0).all()


def test_tariff_finds_the_marginal_value_of_compute() -> None:
    """Loss 0.4 / spent: its marginal value at a budget b is 0.4 / b^2."""
    tariff = Tariff((0.3, 1.0), value_rate=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        budgets = 0.3 + 0.7 * torch.rand(64, generator=generator)
        by_price = -0.2  # spending falls by 0.2 per unit of log-price
        gradient = by_price * (-0.4 / budgets**2 + tariff.values(budgets)) + 0.05 * torch.randn(64, generator=generator)
        tariff.update(budgets, budgets, gradient)
    at = torch.tensor([0.4, 0.6, 0.9])
    torch.testing.assert_close(tariff.values(at), 0.4 / at**2, rtol=0.15, atol=0.0)


def test_tariff_makes_compute_cheap_where_too_little_is_spent() -> None:
    """Controllers that go on saving as long as it is worth something do not carry prices to the end of their range."""
    tariff, budgets = Tariff((0.3, 0.9)), torch.linspace(0.3, 0.9, 32)
    saving = torch.zeros(32)  # what controllers have learned to take from their logits
    for _ in range(400):
        values = tariff.values(budgets)
        saving += 0.3 * (values - 0.05)  # at the price of 0.05 saving costs as much as it gains
        spent = torch.sigmoid(2.0 - tariff.log_prices(budgets) - saving)
        tariff.update(budgets, spent, torch.zeros(32))
    assert (spent - budgets).abs().max() < 0.08
    assert tariff.log_price[-1] > LOG_PRICE_RANGE[0] + 0.5
    assert float(tariff.values(budgets).mean()) < 0.12
