"""What the report's numbers mean and which papers define them: the last section of every page."""

from lorax.report.page import Section

LOSSES = """
<li><b>Loss.</b> Cross entropy in nats, per completion token, or per example for a classifier;
squared error for a task that predicts values. The base's loss is measured at step 0.</li>
"""

UPDATES = """
<li><b>Subspace similarity.</b> LoRA,
<a href="https://arxiv.org/abs/2106.09685">arXiv 2106.09685</a>, section 7.2, with the singular
vectors of A on the input side (appendix G says left ones, but for A (r × in) these are the right
ones).
Chance: uniformly random subspaces, in closed form (a beta distribution).</li>
<li><b>Amplification.</b> The same paper, section 7.3 and table 7, with as many directions as the
adapter's rank. The random column is about r‖W‖/√(in·out).</li>
<li><b>ΔW against W.</b> The same paper, figure 8: φ between the directions of ΔW and of W.</li>
<li><b>Intruder dimensions.</b> Shuttleworth et al.,
<a href="https://arxiv.org/abs/2410.21228">arXiv 2410.21228</a>: leading output directions of W + ΔW
whose cosine with every direction of W is below ε. Control: an update with the singular values of
ΔW, and so its norm, and random directions on both sides.</li>
<li><b>Effective rank.</b> exp of the entropy of σ/Σσ (Roy and Vetterli, EUSIPCO 2007).
<b>Stable rank.</b> Σσ²/σ₁². <b>90% energy rank.</b> The fewest σ that hold 90% of Σσ²
(<a href="https://arxiv.org/abs/2405.09673">arXiv 2405.09673</a>, section 4.6).
<b>Numerical rank.</b> The number of σ above max(in, out)·ε·σ₁, with the ε of float32.</li>
<li><b>Scale.</b> ΔW = s·a·b with s = α/r, or α/√r
(<a href="https://arxiv.org/abs/2312.03732">arXiv 2312.03732</a>), or fixed. Spectra and norms
include s; directions don't depend on it.</li>
"""

SEARCHES = """
<li><b>Intrinsic dimension.</b> θ = θ₀ + Pθ_d with P frozen and random: the smallest d that reaches
a given share (90% for d90) of what full fine-tuning reaches (Li et al.,
<a href="https://arxiv.org/abs/1804.08838">arXiv 1804.08838</a>, section 2; Aghajanyan et al.,
<a href="https://arxiv.org/abs/2012.13255">arXiv 2012.13255</a>). For a score it is the
share of its value; for a loss, the share of its improvement over no training (our choice).</li>
<li><b>Full fine-tuning.</b> At the learning rate with the best mean over seeds.</li>
<li><b>Learning rate.</b> Chosen for each dimension by the mean over seeds, on the same eval set. So
the values of the subspaces and of full fine-tuning are both slightly optimistic.</li>
<li><b>Crossing.</b> Each seed's values are made monotone in d by isotonic regression, then
interpolated linearly in log d up to the needed value. Estimate: geometric mean over seeds.
Interval: Student's t on log d, with n − 1 degrees of freedom. It covers the variation between
seeds, not the choice of data or learning rates.</li>
<li><b>Refinement.</b> A round adds dimensions between the range in which every seed fails and the
range in which every seed succeeds. Each new dimension is trained at the two best learning rates of
the nearest dimension tried before.</li>
"""


def section(*texts: str) -> Section:
    """The section with these notes, e.g. `LOSSES` and `UPDATES`."""
    return Section("Method notes", f"<ul>{''.join(texts)}</ul>")
