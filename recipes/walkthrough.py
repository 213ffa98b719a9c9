# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # GRPO, from eight answers to a trained policy
#
# You know supervised fine-tuning: show a model the right text, and make that text more probable. This notebook starts
# there and ends with a small language model that has taught itself arithmetic, and with the report of its training.
# Each step is a few lines, and they call the functions that the trainer itself calls.
#
# It takes one to two minutes on a CPU, needs no GPU and no network, and wants Jupyter and, from a checkout of this
# package, `pip install ".[report]"`. Numbers in **bold** are computed by the cell beside them. The sources of the
# equations are listed at the end.

# %%
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display
from matplotlib.axes import Axes

from trl_grpo_ext.objective import (
    ClippedObjective,
    aggregate,
    clipped_surrogate,
    gradient_coefficient,
    group_advantages,
    importance_ratio,
    k3_kl,
)
from trl_grpo_ext.rewards import get_exact_correctness_reward


# TRL and transformers still use old names between themselves.
warnings.filterwarnings("ignore", category=FutureWarning)
# Colours for white and for dark pages.
RIGHT, WRONG, OTHER, GREY = "#2a9d8f", "#d1603d", "#6a7fdb", "#767676"
plt.rcParams.update(
    {
        **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], GREY),
        **{"figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False, "font.size": 10},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"},
        **{"figure.figsize": (7.5, 3), "figure.dpi": 100, "figure.constrained_layout.use": True},
    }
)


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """A title that says what to see, and what the axes are."""
    axes.set(title=title, xlabel=x, ylabel=y)


# %% [markdown]
# ## 1. Eight answers and their rewards
#
# Fine-tuning needs somebody who writes the right text. Often it is easier to *judge* a text than to write it: here,
# to see whether an answer is right. So let the model write, several times, and have a function score what it wrote.
#
# The **policy** is the model that we train. It is asked for 2 + 2 × 6 and sampled G = **8** times: a **group**. The
# reward is 1 for the right answer and 0 for any other. A function of rules is enough for that; where none will do, one
# trains a model to score texts, a reward model.

# %%
ANSWERS = ["14", "24", "16", "14", "14", "10", "14", "26"]
G = len(ANSWERS)

is_right = get_exact_correctness_reward(score=1.0)
rewards = torch.tensor(is_right(completions=ANSWERS, answer=["14"] * G))
print(f"G = {G}")
print("rewards:", rewards.tolist())

# %% [markdown]
# ## 2. The advantage: better or worse than the others
#
# A reward says little by itself: 1 is no feat on a question that every answer gets right. What counts is how an answer
# compares with what this policy usually makes of this question, and the group tells us that. The **advantage** is
#
# $$A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r)}$$
#
# Half of the answers are right, so the mean is **0.5**. The standard deviation is **0.5345**: with Bessel's correction
# (divided by G − 1 = 7 and not by 8), as TRL computes it. So a right answer has the advantage **+0.9354** and a wrong
# one **-0.9354**. (In training 0.0001 is added to the deviation, so that nothing is divided by 0.)

# %%
advantages = group_advantages(rewards, G, std_epsilon=0.0)
print(f"mean {rewards.mean():.1f}, standard deviation {rewards.std():.4f}")
print("advantages:", "  ".join(f"{value:+.4f}" for value in advantages))

_, axes = plt.subplots()
axes.bar(range(G), advantages, color=[RIGHT if reward else WRONG for reward in rewards])
axes.set_xticks(range(G), [f"{answer}\nr = {reward:.0f}" for answer, reward in zip(ANSWERS, rewards, strict=True)])
axes.axhline(0, color=GREY, linewidth=0.8)
label(axes, "Right answers are pushed up, wrong ones down", "answer and its reward", "advantage")
plt.show()

# %% [markdown]
# Two things follow at once. Advantages of a group add up to 0: what goes to some answers is taken from others. And a
# group in which all answers are right, or all wrong, has advantages of 0 and teaches nothing. The share of such groups
# is the first number to look at when a run does not learn.

# %%
print("all right:", group_advantages(torch.ones(G), G).tolist())

# %% [markdown]
# ## 3. A policy small enough to look into
#
# To see what an update does, we take the smallest policy that writes such answers. Its tokens are the ten digits. The
# first is drawn from one row of numbers (logits, the same as at the end of a language model), the second from a row
# that depends on the first. It is set up to give exactly the shares that we sampled: "14" has the probability **0.50**.
#
# The rows that the trainer works with look like these: for each answer the log-probability of each of its tokens, and
# a mask that says which tokens count (those of the answer; not the prompt's, and not padding).

# %%
tokens = torch.tensor([[int(digit) for digit in answer] for answer in ANSWERS])
mask = torch.ones(G, 2)


def new_policy() -> list[torch.Tensor]:
    """Logits of the first digit, `(10,)`, and of the second one after each first, `(10, 10)`."""
    first, second = torch.full((10,), 1e-6), torch.full((10, 10), 1e-6)
    for one, two in tokens.tolist():
        first[one] += 1
        second[one, two] += 1
    return [first.log().requires_grad_(), second.log().requires_grad_()]


def logps_of(policy: list[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of answers' tokens, `(answers, 2)`."""
    first, second = (logits.log_softmax(-1) for logits in policy)
    return torch.stack([first[tokens[:, 0]], second[tokens[:, 0], tokens[:, 1]]], dim=1)


def probability_of_14(policy: list[torch.Tensor]) -> float:
    return logps_of(policy, torch.tensor([[1, 4]])).sum().exp().item()


policy = new_policy()
old_logps = logps_of(policy, tokens).detach()
print(f'P("14") = P("1") P("4" after "1") = {probability_of_14(policy):.2f}')
print(f"log-probabilities of its two tokens: {old_logps[0, 0]:.3f}, {old_logps[0, 1]:.3f}")

# %% [markdown]
# ## 4. The ratio, and the clip
#
# Sampling is the expensive part, so we want to learn from the same answers more than once. After the first update the
# policy is no longer the one that sampled (the **old policy**), and each token is corrected by the **ratio** of its
# probability now to the one then:
#
# $$\rho = \frac{\pi_\theta(\text{token})}{\pi_{\text{old}}(\text{token})}$$
#
# If a token's probability went from 0.5 to 0.7, its ratio is **1.4**. What we maximize (the **surrogate**) is
# $\rho A$, but only near 1: PPO's **clip** ends the reward for moving further than $\varepsilon$, here 0.2:
#
# $$\min(\rho A,  \mathrm{clip}(\rho, 1 - \varepsilon, 1 + \varepsilon) A)$$
#
# So for A = 1 the ratio 1.4 counts as **1.2**, and the coefficient of its gradient is **0.0**: this token has been
# made probable enough for now, and is left alone. (`epsilon` in the settings.)

# %%
EPSILON = 0.2
one = torch.ones(1, 1)
ratio = importance_ratio(torch.tensor([[0.7]]).log(), torch.tensor([[0.5]]).log(), mask=one)
print(f"ratio {ratio.item():.1f}")
print(f"surrogate for A = 1: {clipped_surrogate(ratio, one, EPSILON, EPSILON).item():.1f}")
print(f"coefficient of its gradient: {gradient_coefficient(ratio, one, EPSILON, EPSILON).item():.1f}")

ratios = torch.linspace(0.4, 1.6, 241)
_, panels = plt.subplots(1, 2, sharex=True)
for axes, advantage, colour in zip(panels, (1.0, -1.0), (RIGHT, WRONG), strict=True):
    axes.plot(ratios, ratios * advantage, color=GREY, linestyle=":", label="without the clip")
    surrogate = clipped_surrogate(ratios, torch.tensor(advantage), EPSILON, EPSILON)
    axes.plot(ratios, surrogate, color=colour, linewidth=2, label="with it")
    axes.axvspan(1 - EPSILON, 1 + EPSILON, color=GREY, alpha=0.15, linewidth=0)
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.legend()
label(panels[0], "A > 0: no gain above 1.2", "ratio", "surrogate, to be maximized")
label(panels[1], "A < 0: no gain below 0.8", "ratio", "")
plt.show()

# %% [markdown]
# The clip works on one side only. A good token that has become *less* probable (left panel, left end) keeps its full
# gradient, so mistakes can be put right; only going too far in the right direction pays nothing. It is no wall either:
# it stops pushing, and does not pull back.

# %% [markdown]
# ## 5. KL: how far from where we started
#
# A second rein is optional: a penalty for moving away from the model before training (the **reference policy**), so
# that it does not forget how to write. The distance is the Kullback-Leibler divergence, KL, in nats. Computing it
# exactly would need all tokens of the vocabulary; GRPO estimates it from the one that was sampled, with the estimator
# called k3:
#
# $$k_3 = \frac{\pi_{\text{ref}}}{\pi_\theta} - \log\frac{\pi_{\text{ref}}}{\pi_\theta} - 1$$
#
# It is 0 where both agree, never negative, and right on average. For a policy that gives three tokens the
# probabilities 0.5, 0.3, 0.2 and a reference that gives them 0.4, 0.4, 0.2, the exact KL and the mean of k3 are both
# **0.0253**. (Its weight is `beta` in the settings: 0 in TRL, unless you set it, and there is no reference model then.)

# %%
policy_p, reference_p = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
exact = (policy_p * (policy_p / reference_p).log()).sum()
estimate = (policy_p * k3_kl(policy_p.log(), reference_p.log())).sum()
print(f"KL: exact {exact:.4f}, mean of k3 {estimate:.4f}")

log_ratios = torch.linspace(-1.5, 1.5, 201)
_, axes = plt.subplots()
axes.plot(log_ratios, log_ratios, color=GREY, linestyle=":", label="plain estimate, log(policy / reference)")
axes.plot(log_ratios, k3_kl(log_ratios, torch.zeros(201)), color=OTHER, linewidth=2, label="k3")
axes.axhline(0, color=GREY, linewidth=0.8)
axes.legend()
label(axes, "k3 is never negative", "log(policy / reference) of the sampled token", "nats")
plt.show()

# %% [markdown]
# ## 6. The loss is 0, and the gradient is not
#
# Put together, GRPO minimizes the mean over the answers, and over the tokens of each, of
#
# $$-\min(\rho A,  \mathrm{clip}(\rho, 1 - \varepsilon, 1 + \varepsilon) A) + \beta\, k_3$$
#
# Now the thing that worries everybody who looks at the curves for the first time. In the first update the policy *is*
# the old policy. Every ratio is exactly 1, the loss is the mean of −A, and that is **0.0**. But a gradient does not
# care for the value. The derivative of $\rho$ at 1 is that of the log-probability, so each token's log-probability is
# pushed by its advantage, and the norm of the gradient is **0.253**. Watch the rewards, not the loss.

# %%
objective = ClippedObjective(EPSILON, EPSILON)
logps = logps_of(policy, tokens)
output = objective(logps, old_logps, advantages, mask)
gradient = torch.autograd.grad(output.loss, [logps, *policy])
norm = torch.cat([part.flatten() for part in gradient[1:]]).norm()
print(f"loss {output.loss.abs():.1f}, ratios {output.ratio.min():.1f} to {output.ratio.max():.1f}")
print(f"norm of the policy's gradient {norm:.3f}")

coefficients = gradient_coefficient(output.ratio, advantages.unsqueeze(1), EPSILON, EPSILON)
is_same = torch.allclose(-gradient[0] * mask.sum(), coefficients.expand(G, 2))
print(f"each token's log-probability is pushed by its advantage, over the number of tokens: {is_same}")

# %% [markdown]
# With fine-tuning in mind: this is the gradient of fine-tuning on one's own samples, where each sample is weighed by
# its advantage, and the bad ones have negative weights.

# %% [markdown]
# ## 7. What a second pass changes
#
# One update on the eight answers is a **pass**. Now we make eight, on the same answers, each a step of plain gradient
# descent, once with the clip and once without.

# %%
PASSES = 8


def train(objective: ClippedObjective) -> pd.DataFrame:
    """Pass after pass over the same eight answers, and what there is to see at each."""
    policy, rows = new_policy(), []
    for number in range(1, PASSES + 1):
        output = objective(logps_of(policy, tokens), old_logps, advantages, mask)
        gradient = torch.autograd.grad(output.loss, policy)
        rows.append(
            {
                "pass": number,
                'P("14")': probability_of_14(policy),
                "loss": output.loss.item() + 0.0,
                "gradient": torch.cat([part.flatten() for part in gradient]).norm().item(),
                "clipped tokens": output.metrics["clip_ratio/region_mean"].item(),
                'ratio of "4" in "14"': output.ratio[0, 1].item(),
                'ratio of "2" in "24"': output.ratio[1, 0].item(),
            }
        )
        policy = [(logits - part).requires_grad_() for logits, part in zip(policy, gradient, strict=True)]
    return pd.DataFrame(rows).set_index("pass")


clipped, unclipped = train(objective), train(ClippedObjective(1e9, 1e9))
display(clipped.round(3))

# %% [markdown]
# In the first pass all ratios are 1 and no clip can bind: whatever $\varepsilon$ is, one pass is the same. Then the
# ratios move. In pass 3 the clip binds for a quarter of the tokens (**0.25**), from pass 6 on for half of them
# (**0.50**), and the gradient falls to **0.029**, about a ninth of the first. That is what the clip is for: the same
# answers pull less and less. Without it, nothing holds the policy, though it was told of eight answers only.

# %%
print(f"clipped tokens in pass 3: {clipped['clipped tokens'][3]:.2f}, in pass 6: {clipped['clipped tokens'][6]:.2f}")
print(f"gradient in pass 6: {clipped['gradient'][6]:.3f}")

_, panels = plt.subplots(1, 2)
for frame, style, name in ((clipped, "-", "with the clip"), (unclipped, ":", "without")):
    panels[0].plot(
        frame.index, frame['ratio of "4" in "14"'], color=RIGHT, linestyle=style, label=f'"4" of 14, {name}'
    )
    panels[0].plot(
        frame.index, frame['ratio of "2" in "24"'], color=WRONG, linestyle=style, label=f'"2" of 24, {name}'
    )
    panels[1].plot(frame.index, frame['P("14")'], color=OTHER, linestyle=style, label=name)
panels[0].axhspan(1 - EPSILON, 1 + EPSILON, color=GREY, alpha=0.15, linewidth=0)
panels[0].set_ylim(0, 1.4)
panels[0].legend(fontsize=8, loc="lower left")
panels[1].legend()
label(panels[0], "Ratios leave 1 after the first pass", "pass", "ratio")
label(panels[1], "The clip slows the policy down", "pass", 'P("14")')
plt.show()

# %% [markdown]
# The ratio of "2" goes on falling after it was clipped. Nobody pushes it any more, but probabilities add up to 1: as
# "1" rises, "2" has to give way. So a clip does not bound how far a policy moves. `target_kl` of this package does:
# it measures the KL from the old to the new policy in each pass, and when it is too large, it gives up the passes that
# remain and has new answers sampled in their place.

# %% [markdown]
# ## 8. Token level and sequence level
#
# The reward is for a whole answer, but the ratio above is one of each token. GSPO makes it one of the **sequence**, the
# geometric mean of its tokens' ratios, so that an answer is clipped as a whole or not at all. Take an answer of four
# tokens with the ratios 1.5, 1.1, 0.9 and 1.0. Token by token, the first is clipped and the other three are not. The
# sequence's ratio is **1.10**, within the clip, so that all four go on learning. (Means vary less than single tokens
# do, so at the sequence level one takes a far smaller $\varepsilon$: GSPO's is a few ten-thousandths. In the settings
# the level is `importance_sampling_level`.)

# %%
of_tokens = torch.tensor([[1.5, 1.1, 0.9, 1.0]])
at_once = importance_ratio(of_tokens.log(), torch.zeros(1, 4), torch.ones(1, 4), level="sequence")
print(f"ratio of the sequence: {at_once.item():.2f}")
for level in ("token", "sequence"):
    logps = of_tokens.log().requires_grad_()
    result = ClippedObjective(EPSILON, EPSILON, level=level)(logps, torch.zeros(1, 4), torch.ones(1), torch.ones(1, 4))
    (push,) = torch.autograd.grad(-4 * result.loss, logps)
    print(f"{level} level, push on each token: {'  '.join(f'{value:.2f}' for value in push[0])}")

_, axes = plt.subplots(figsize=(7.5, 2.6))
axes.scatter(range(1, 5), of_tokens[0], color=[WRONG, RIGHT, RIGHT, RIGHT], zorder=3, label="ratio of a token")
axes.axhline(at_once.item(), color=OTHER, label="ratio of the sequence")
axes.axhspan(1 - EPSILON, 1 + EPSILON, color=GREY, alpha=0.15, linewidth=0)
axes.set_xticks(range(1, 5))
axes.legend(loc="upper right")
label(axes, "One token is outside the clip, the sequence is not", "token", "ratio")
plt.show()

# %% [markdown]
# A second choice goes by the same words: how tokens are put together. GRPO takes the mean over each answer first, so
# that a token of a short answer weighs more; TRL's default, DAPO's, counts all tokens alike; Dr. GRPO divides by the
# longest length an answer may have, always the same number. This is what one token weighs in an answer of 2 tokens
# beside one of 6. With GRPO it is **0.250** against **0.083**: among wrong answers, long ones are held against the
# policy less, and so they may get longer. (`loss_type` in the settings.)

# %%
lengths = torch.tensor([[1.0] * 2 + [0.0] * 4, [1.0] * 6])
weights = {}
for loss_type in ("grpo", "dapo", "dr_grpo"):
    per_token = torch.zeros(2, 6, requires_grad=True)
    loss = aggregate(per_token, lengths, loss_type, num_tokens=lengths.sum(), max_completion_length=6)
    (push,) = torch.autograd.grad(loss, per_token)
    weights[loss_type] = {"in the answer of 2": f"{push[0, 0]:.3f}", "in that of 6": f"{push[1, 0]:.3f}"}
display(pd.DataFrame(weights).T)

# %% [markdown]
# ## 9. Without the division by the deviation
#
# Dr. GRPO also leaves out the division: $A_i = r_i - \mathrm{mean}(r)$. Why that matters shows in groups that are
# nearly all wrong or nearly all right. The one right answer among eight has the advantage **2.475** with the division,
# and **0.875** without. So the division makes questions that are nearly solved, or nearly hopeless, count as much as
# others, and a lucky guess may be among the latter. Without it, questions count by how unsure the policy is. In return
# the division makes the size of rewards irrelevant; without it, twice the rewards are twice the gradient.
# (`scale_rewards="none"` in the settings.)

# %%
counts = range(1, G)
groups = torch.tensor([[1.0] * count + [0.0] * (G - count) for count in counts]).flatten()
divided = group_advantages(groups, G, std_epsilon=0.0).view(-1, G)
plain = group_advantages(groups, G, scale=False).view(-1, G)
print(f"one right answer of eight: {divided[0, 0]:.3f} with the division, {plain[0, 0]:.3f} without")

_, panels = plt.subplots(1, 2, sharey=True)
for axes, pushes in zip(panels, (divided, plain), strict=True):
    axes.plot(counts, pushes[:, 0], color=RIGHT, marker="o", label="right answers")
    axes.plot(counts, pushes[:, -1], color=WRONG, marker="o", label="wrong answers")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.legend()
label(panels[0], "With it, rare answers are pushed hard", "right answers of 8", "advantage")
label(panels[1], "Without it, no push is above 1", "right answers of 8", "")
plt.show()

# %% [markdown]
# ## 10. PPO and GRPO
#
# GRPO is PPO without its second model. PPO trains a **value model**, of about the size of the policy, that predicts at
# each token what reward is still to come; the advantage is by how much things turned out better than predicted. GRPO
# asks the group instead. What each of it costs, for a policy of P parameters:
#
# | | PPO | GRPO |
# |---|---|---|
# | What is expected | a value model predicts it, for each token | the mean of the group, for the whole answer |
# | Advantage | generalized advantage estimation (GAE): one for each token, two more settings (γ, λ) | one for the answer, on all its tokens |
# | Models that are trained | policy and value model: 2 × 16 P bytes | policy: 16 P bytes |
# | Models that only compute | reference and reward model: 2 × 2 P bytes | none, or the reference with KL: 2 P bytes |
# | Answers to a question | one is enough | a group, 4 to 64 |
# | Forward passes before learning | old policy, values, reference, reward model: 4 × 2 P operations a token | none (see below), or the reference with KL: 2 P |
# | Each pass over the answers | policy and value model: 2 × 6 P operations a token | policy: 6 P |
# | Where it fails | while the value model is wrong, so is every advantage | groups that are all right or all wrong teach nothing |
# | Where it shines | long tasks, where it matters which step was good | answers that can be checked at their end |
#
# The 16 bytes are a parameter's weight and gradient in 16 bits, and in 32 bits its weight and Adam's two moments; a
# model that only computes needs its 16 bits. A forward pass takes about 2 operations a parameter and token, forward
# and backward 6. Activations come on top, and generation, which takes most of the time in both. Assumed are a value
# model and a reward model as large as the policy; and in GRPO rewards from rules, as here. A reward model costs GRPO
# the same as PPO. GRPO's first pass gives the old policy's log-probabilities too, so no forward pass is spent on them
# (TRL spends one where there are several passes).
#
# For 7 billion parameters, PPO keeps **252** GB of weights and states, GRPO **112** GB, and with KL **126** GB. But
# GRPO's saving in operations is one per answer, and it needs a group of answers to each question: what it really saves
# is memory, and a second model that has to be trained well.

# %%
BYTES_TRAINED, BYTES_FROZEN, FORWARD, FORWARD_BACKWARD = 16, 2, 2, 6


def cost(trained: int, frozen: int, forwards: int, passes: int = 4) -> dict[str, str]:
    operations = forwards * FORWARD + passes * trained * FORWARD_BACKWARD
    memory = {
        f"{size} B": f"{size * (trained * BYTES_TRAINED + frozen * BYTES_FROZEN):g} GB" for size in (0.5, 1.5, 7)
    }
    return {**memory, f"operations a token, {passes} passes": f"{operations} P"}


costs = {
    "PPO": cost(trained=2, frozen=2, forwards=4),
    "GRPO with KL": cost(trained=1, frozen=1, forwards=1),
    "GRPO": cost(trained=1, frozen=0, forwards=0),
}
display(pd.DataFrame(costs).T)

# %% [markdown]
# ## 11. Train a policy
#
# Enough of ten digits. This package ships a real, if tiny, language model: 730,880 parameters, fine-tuned on word
# problems so that it knows how to write a solution, but mostly takes the wrong way to it. Which way is right it is to
# learn from rewards alone. Its problems are made from a seed.
#
# Five rewards come as a **bundle**: four look at the form, one at the answer. Settings are TRL's: 8 problems and 8
# answers to each a generation, two passes over them. The callback has 100 held-out problems answered before training
# and after it.

# %%
from trl_grpo_ext import EvaluationCallback, GRPOExtConfig, GRPOExtTrainer
from trl_grpo_ext.embedded_policy import embedded_policy_path
from trl_grpo_ext.evaluation import read_answers
from trl_grpo_ext.rewards import gsm8k_bundle
from trl_grpo_ext.tasks import load_arithmetic


problems = load_arithmetic("train", 2048)
heldout = load_arithmetic("heldout", 100)
bundle = gsm8k_bundle()
print(problems[0]["prompt"][-1]["content"], "->", problems[0]["answer"])
for name, weight in zip(bundle.names, bundle.weights, strict=True):
    print(f"  {name}, weight {weight}")

# %%
trainer = GRPOExtTrainer(
    model=embedded_policy_path(),
    reward_funcs=bundle,
    args=GRPOExtConfig(
        output_dir="outputs/walkthrough",
        max_steps=40,
        learning_rate=3e-4,
        per_device_train_batch_size=64,
        num_generations=8,
        num_iterations=2,
        max_completion_length=96,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=0,
    ),
    train_dataset=problems,
)
evaluation = EvaluationCallback(trainer, heldout, samples_per_item=2, batch_size=100)
trainer.add_callback(evaluation)
trainer.train()

for name, figures in (("before", evaluation.before), ("after", evaluation.after)):
    assert figures is not None  # it has been evaluated
    right = figures["heldout"].estimates["strict"]
    print(f"right answers {name}: {right.mean:.0%} (95 % interval {right.low:.0%} to {right.high:.0%})")

# %% [markdown]
# The intervals are wide because 100 problems are not many. As announced, the loss says nothing. But look at what the
# policy makes of a problem that it did not solve before:

# %%
answers = {name: read_answers(f"outputs/walkthrough/answers/{name}.jsonl") for name in ("before", "after")}
for old, new in zip(answers["before"], answers["after"], strict=True):
    if old.temperature == 0 and old.correct != new.correct and (new.correct or {}).get("strict"):
        print(old.prompt[-1]["content"])
        print(f"\nbefore:\n{old.completion}\n\nafter:\n{new.completion}")
        break

# %% [markdown]
# ## 12. Read its report
#
# While it trained, the run kept a record of itself. The report sums it up in a sentence, says what is wrong with the
# run and what to do about it, and draws the curves. `outputs/walkthrough/report.html` has all of it, with completions
# from early, middle and late, in one file to open in a browser; `trl-grpo-ext report outputs/walkthrough` writes the
# same, also while a run goes on.

# %%
from trl_grpo_ext.report.doctor import diagnose
from trl_grpo_ext.report.page import write_report
from trl_grpo_ext.report.pictures import charts_of
from trl_grpo_ext.report.record import read_record
from trl_grpo_ext.report.summary import summarize


run = read_record("outputs/walkthrough")
print(summarize(run).sentence)

findings = diagnose(run)
print(f"\nwhat is wrong with it: {len(findings) or 'nothing that the rules know of'}")
for finding in findings:
    print(f"{finding.severity}: {finding.message}")

print("\nthe whole report:", write_report([run], "outputs/walkthrough/report.html"))

# %%
charts = {chart.name: chart for chart in charts_of([run])}
_, panels = plt.subplots(1, 2, figsize=(7.5, 3.2))
titles = {"format": "First the form, then the answers", "clipped": "The clip binds in pass 2"}
for axes, name in zip(panels, titles, strict=True):
    chart = charts[name]
    for curve, colour in zip(chart.curves, (RIGHT, OTHER), strict=True):
        axes.plot(curve.x, curve.y, color=colour, label=curve.label)
    axes.set_ylim(*chart.limits)
    axes.legend(fontsize=8)
    label(axes, titles[name], chart.x_label, chart.y_label)
plt.show()

# %% [markdown]
# On the left is what the rewards pay, as a share of all they could pay: the form is soon right, and the answers follow.
# On the right is section 7 again, in a real run: in the first pass no clip can bind, in the second it does, and less
# and less as the learning rate falls and more groups are all right.
#
# ## Where to go from here
#
# `trl-grpo-ext launch recipes/gsm8k.py` is the same as a command; with `--config recipes/configs/qwen2.5-0.5b.yaml` it
# trains a real model. `recipes/README.md` says how to use your own data and rewards.
#
# Sources: GRPO, its advantage, k3 and the coefficients of the gradient: DeepSeekMath,
# [arXiv 2402.03300](https://arxiv.org/abs/2402.03300), section 4.1 and equations 3, 4 and 21. The clip: PPO,
# [arXiv 1707.06347](https://arxiv.org/abs/1707.06347), equation 7. The sequence level: GSPO,
# [arXiv 2507.18071](https://arxiv.org/abs/2507.18071). Without the division: Dr. GRPO,
# [arXiv 2503.20783](https://arxiv.org/abs/2503.20783). All tokens alike: DAPO,
# [arXiv 2503.14476](https://arxiv.org/abs/2503.14476). GAE: [arXiv 1506.02438](https://arxiv.org/abs/1506.02438).
