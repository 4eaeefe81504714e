"""Noise model of label lists: missing and wrong labels of each class, from held-out votes without true labels.

For a sample and a class, let x_m be the vote of member m of M votes, as the logarithm of its odds relative to those of
the class frequency. The class is present with probability

    q = sigmoid(logit(class frequency) + a + sum_m b_m x_m)

If the class is present, its label is missing at rate u; if it is absent, its label is given at rate v. The label is
therefore given with probability

    pi = q (1 - u) + (1 - q) v

The votes do not contain the sample's own label, so the likelihood of the given labels under pi identifies all
parameters of a class: u is the gap between pi and 1 where the votes are certain of the class, and v is pi where they
are certain of its absence. Rare classes have few certain votes; all parameters have a normal prior over the classes,
whose mean and variance are estimated from all classes (empirical Bayes).
Legend: n samples of this rank, t samples of a tile, C classes, M members, P = M + 3 parameters of a class.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_
from distav.noise.tiling import tiles

SMALLEST = 1e-9
"""Lower bound of the probability of a given label, and of its absence."""
MISSING_PRIOR, WRONG_PRIOR = (-1.7, 1.5), (-3.9, 1.5)
"""Mean and standard deviation of the typical logit of both rates: 15 % and 2 %, each within a factor of about four."""
TYPICAL_WEIGHT_SUM = 5.0
"""Typical sum of the weights of the members."""
TYPICAL_DEVIATIONS = (1.0, 0.5, 0.7, 0.7)
"""Expected standard deviations over the classes of the offset, the weights, and the logits of both rates."""
DEVIATION_CLASSES = 4.0
"""Weight of these expected deviations, in classes."""
LATER_DEVIATION = 0.05
"""Standard deviation of the logit of a rate around its estimate from an earlier correction."""
NUM_ROUNDS, NUM_STEPS = 12, 12
"""Updates of the prior, and largest number of Newton steps in each."""
ZERO_LOGIT = -16.0
"""Logit of a rate of 0, as far as any number of labels can show."""
TOLERANCE = 1e-4
"""Improvement of the log-likelihood of every class, in nats, at which the steps end."""
PRIOR_TOLERANCE = 0.01
"""Change of the means of the prior at which its updates end."""


@dataclass(frozen=True)
class ClassPrior:
    """Normal prior of the parameters of each class.

    Attributes:
        mean: [C, P].
        variance: [C, P].
    """

    mean: Tensor
    variance: Tensor

    def log_density(self, parameters: Tensor) -> Tensor:
        """Return the logarithm of the density of parameters [C, P], up to a constant: [C]."""
        return -0.5 * ((parameters - self.mean).square() / self.variance).sum(1)


@dataclass(frozen=True)
class MultiLabelModel:
    """Noise model that was fitted to the given labels.

    Attributes:
        parameters: [C, P] float64: offset, weights of the members, logits of the missing and of the wrong rate.
        deviations: [C, P] standard deviations of the parameters for a known prior (Laplace approximation).
        shared_deviations: [C, P] further deviations from the uncertain mean of the prior, by the same number of
            standard deviations in all classes.
        zero_losses: [C, 2] log-likelihood that is lost if the missing, or the wrong rate of a class is 0, in nats.
        log_likelihood: log-likelihood of the given labels of all ranks, in nats.
        effective_parameters: number of parameters that the labels determine, over all classes.
    """

    parameters: Tensor
    deviations: Tensor
    shared_deviations: Tensor
    zero_losses: Tensor
    log_likelihood: float
    effective_parameters: float

    @property
    def missing_rate(self) -> Tensor:
        """P(label missing | class present) of each class, [C]."""
        return self.parameters[:, -2].sigmoid()

    @property
    def wrong_rate(self) -> Tensor:
        """P(label given | class absent) of each class, [C]."""
        return self.parameters[:, -1].sigmoid()

    def held_out(self, votes: Tensor, offsets: Tensor) -> Tensor:
        """Return P(class present | votes): votes [t, C, M] -> [t, C] float32."""
        return _presence(self.parameters, votes.double(), offsets).float()

    def posterior(self, held_out: Tensor, given: Tensor) -> Tensor:
        """Return P(class present | votes, given label) by Bayes' rule.

        Args:
            held_out: [t, C] P(class present | votes).
            given: [t, C] bool given labels.
        """
        missing, wrong = self.missing_rate.to(held_out), self.wrong_rate.to(held_out)
        present = held_out * torch.where(given, 1 - missing, missing)
        absent = (1 - held_out) * torch.where(given, wrong, 1 - wrong)
        return present / (present + absent).clamp_min(SMALLEST)


@dataclass(frozen=True)
class LabelVotes:
    """Votes on the labels of this rank's samples, and what they are compared with.

    Attributes:
        votes: [n, C, M] log-odds relative to the class frequency.
        given: [n, C] bool given labels.
        offsets: [C] float64 logits of the class frequencies.
    """

    votes: Tensor
    given: Tensor
    offsets: Tensor

    @property
    def num_parameters(self) -> int:
        """Number of parameters P of a class."""
        return self.votes.shape[2] + 3

    def evaluate(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-likelihood [C], its gradient [C, P] and the Fisher information [C, P, P], over all ranks."""
        num_classes, num_parameters = parameters.shape
        totals = parameters.new_zeros(num_classes, 1 + num_parameters + num_parameters**2)
        missing, wrong = parameters[:, -2].sigmoid(), parameters[:, -1].sigmoid()
        for part in tiles(len(self.votes), num_classes * num_parameters, parameters.device):
            votes, given = self.votes[part].double(), self.given[part].double()
            presence = _presence(parameters, votes, self.offsets)
            probs = (presence * (1 - missing) + (1 - presence) * wrong).clamp(SMALLEST, 1 - SMALLEST)
            slope = ((1 - missing - wrong) * presence * (1 - presence))[..., None]
            rates = torch.stack([-presence * missing * (1 - missing), (1 - presence) * wrong * (1 - wrong)], dim=2)
            derivatives = torch.cat([slope, slope * votes, rates], dim=2)
            variance = (probs * (1 - probs))[..., None]
            information = torch.einsum("tcp,tcq->cpq", derivatives / variance, derivatives)
            gradient = (derivatives * (given - probs)[..., None] / variance).sum(0)
            log_likelihood = torch.where(given > 0, probs, 1 - probs).log().sum(0)
            totals += torch.cat([log_likelihood[:, None], gradient, information.flatten(1)], dim=1)
        all_reduce_sum_(totals)
        sizes = (1, num_parameters, num_parameters**2)
        log_likelihood, gradient, information = totals.split(sizes, dim=1)
        return log_likelihood[:, 0], gradient, information.view(num_classes, num_parameters, num_parameters)


def _presence(parameters: Tensor, votes: Tensor, offsets: Tensor) -> Tensor:
    """Return q, the probability that each class is present: votes [t, C, M] -> [t, C] float64."""
    return (offsets + parameters[:, 0] + torch.einsum("tcm,cm->tc", votes, parameters[:, 1:-2])).sigmoid()


def frequency_log_likelihood(given: Tensor) -> float:
    """Return the log-likelihood of the given labels [n, C] of all ranks under the frequencies of the classes."""
    counts = all_reduce_sum_(given.double().sum(0))
    total = float(all_reduce_sum_(torch.tensor([float(len(given))], dtype=torch.float64, device=given.device)))
    fractions = (counts / max(total, 1.0)).clamp(SMALLEST, 1 - SMALLEST)
    return float((counts * fractions.log() + (total - counts) * (1 - fractions).log()).sum())


def fit_model(votes: LabelVotes, earlier_rates: Tensor | None = None, num_rounds: int = NUM_ROUNDS) -> MultiLabelModel:
    """Fit the noise model to the given labels: maximum a posteriori under a prior that all classes share.

    Args:
        votes: votes and given labels of this rank.
        earlier_rates: [C, 2] logits of the missing and the wrong rate of each class from an earlier correction, around
            which the rates stay, because later features may reproduce the given labels; None to estimate them.
        num_rounds: updates of the prior.
    """
    num_classes, num_members = votes.votes.shape[1], votes.votes.shape[2]
    device = votes.offsets.device
    typical = torch.tensor(
        [0.0, *[TYPICAL_WEIGHT_SUM / num_members] * num_members, MISSING_PRIOR[0], WRONG_PRIOR[0]],
        dtype=torch.float64,
        device=device,
    )
    offset, weight, missing, wrong = TYPICAL_DEVIATIONS
    expected = torch.tensor([offset, *[weight] * num_members, missing, wrong], dtype=torch.float64, device=device)
    spread = torch.tensor(
        [1.0, *[1.0] * num_members, MISSING_PRIOR[1], WRONG_PRIOR[1]], dtype=torch.float64, device=device
    ).square()
    prior = ClassPrior(typical.expand(num_classes, -1).clone(), expected.square().expand(num_classes, -1).clone())
    prior = _with_earlier_rates(prior, earlier_rates)
    parameters = prior.mean.clone()
    for _ in range(num_rounds):
        parameters, log_likelihood, information = _maximize(votes, parameters, prior)
        covariance = torch.linalg.inv(information + torch.diag_embed(1 / prior.variance))
        previous = prior
        prior = _update_prior(parameters, covariance, prior, typical, spread, expected.square())
        prior = _with_earlier_rates(prior, earlier_rates)
        if float((prior.mean - previous.mean).abs().max()) < PRIOR_TOLERANCE:
            break
    parameters, log_likelihood, information = _maximize(votes, parameters, prior)
    covariance = torch.linalg.inv(information + torch.diag_embed(1 / prior.variance))
    effective = torch.einsum("cpq,cqp->", covariance, information)
    variances = covariance.diagonal(dim1=1, dim2=2)
    shared = _shared_deviations(variances, prior, spread)
    losses: list[Tensor] = []
    for column in (-2, -1):
        without = parameters.clone()
        without[:, column] = ZERO_LOGIT
        losses.append(log_likelihood - votes.evaluate(without)[0])
    total = float(log_likelihood.sum())
    return MultiLabelModel(parameters, variances.sqrt(), shared, torch.stack(losses, 1), total, float(effective))


def _shared_deviations(variances: Tensor, prior: ClassPrior, spread: Tensor) -> Tensor:
    """Return the standard deviations that the uncertain mean of the prior adds to the parameters: [C, P].

    Args:
        variances: [C, P] of the parameters for a known prior.
        prior: the prior.
        spread: [P] variance of its mean before the labels are known.
    """
    shrinkage = (variances / prior.variance).clamp_max(1)
    # Each class measures the mean with the variance over the classes and that of its own likelihood.
    precision = ((1 - shrinkage) / prior.variance).sum(0) + 1 / spread
    return shrinkage / precision.sqrt()


def _with_earlier_rates(prior: ClassPrior, earlier_rates: Tensor | None) -> ClassPrior:
    """Return the prior with the rates of an earlier correction."""
    if earlier_rates is None:
        return prior
    mean, variance = prior.mean.clone(), prior.variance.clone()
    mean[:, -2:], variance[:, -2:] = earlier_rates, LATER_DEVIATION**2
    return ClassPrior(mean, variance)


def _update_prior(
    parameters: Tensor, covariance: Tensor, prior: ClassPrior, typical: Tensor, spread: Tensor, expected: Tensor
) -> ClassPrior:
    """Return the prior that the parameters of all classes suggest (one step of expectation-maximization).

    Args:
        parameters, covariance: [C, P] and [C, P, P].
        prior: current prior.
        typical, spread: [P] mean and variance of the prior's mean.
        expected: [P] variance over the classes that is expected.
    """
    num_classes, variance = len(parameters), prior.variance[0]
    mean = (parameters.sum(0) / variance + typical / spread) / (num_classes / variance + 1 / spread)
    scatter = ((parameters - mean).square() + covariance.diagonal(dim1=1, dim2=2)).sum(0)
    variance = (scatter + DEVIATION_CLASSES * expected) / (num_classes + DEVIATION_CLASSES)
    return ClassPrior(mean.expand(num_classes, -1).clone(), variance.expand(num_classes, -1).clone())


def _maximize(votes: LabelVotes, parameters: Tensor, prior: ClassPrior) -> tuple[Tensor, Tensor, Tensor]:
    """Maximize the posterior of each class by damped Newton steps with the Fisher information.

    Returns:
        Parameters [C, P], and their log-likelihood [C] and Fisher information [C, P, P].
    """
    log_likelihood, gradient, information = votes.evaluate(parameters)
    objective = log_likelihood + prior.log_density(parameters)
    damping = torch.full_like(objective, 1e-3)
    precision = torch.diag_embed(1 / prior.variance)
    for _ in range(NUM_STEPS):
        curvature = information + precision
        slope = gradient - (parameters - prior.mean) / prior.variance
        damped = curvature + torch.diag_embed(damping[:, None] * curvature.diagonal(dim1=1, dim2=2))
        step = torch.linalg.solve(damped, slope[..., None])[..., 0].clamp(-2, 2)
        proposed = parameters + step
        results = votes.evaluate(proposed)
        improved = results[0] + prior.log_density(proposed)
        accepted = improved >= objective
        gain = torch.where(accepted, improved - objective, torch.zeros_like(objective))
        parameters = torch.where(accepted[:, None], proposed, parameters)
        log_likelihood = torch.where(accepted, results[0], log_likelihood)
        gradient = torch.where(accepted[:, None], results[1], gradient)
        information = torch.where(accepted[:, None, None], results[2], information)
        objective = torch.where(accepted, improved, objective)
        damping = torch.where(accepted, damping / 5, damping * 10)
        if bool(accepted.all()) and float(gain.max()) < TOLERANCE:
            break
    return parameters, log_likelihood, information
