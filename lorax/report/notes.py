"""What the report's numbers mean, and where they come from: the last section of every page."""

from lorax.report.page import Section

LOSSES = """
<li><b>One-standard-error rule.</b> The smallest rank whose mean final eval loss is at most the
lowest mean plus that mean's standard error (standard deviation over seeds, n − 1, divided by √n).
It asks for the simplest setting that the data can't tell from the best, and is no test of
equality.</li>
<li><b>Loss.</b> Cross entropy in nats, per completion token or, of a classifier, per example
(squared error where it predicts values); the base's is the eval at step 0.</li>
"""

UPDATES = """
<li><b>Subspace similarity.</b> LoRA,
<a href="https://arxiv.org/abs/2106.09685">arXiv 2106.09685</a>, section 7.2: singular vectors of A
on the input side (appendix G says left; for A (r × in) the right ones are meant). Control:
Gaussian matrices of the same shape.</li>
<li><b>Amplification.</b> The same paper, section 7.3 and table 7, with the adapter's own rank.
The random column is about r‖W‖/√(in·out).</li>
<li><b>ΔW against W.</b> The same paper's figure 8: φ between the directions of ΔW and of W.</li>
<li><b>Intruder dimensions.</b> Shuttleworth et al.,
<a href="https://arxiv.org/abs/2410.21228">arXiv 2410.21228</a>: leading output directions of W + ΔW
whose cosine with every direction of W is below ε. Control: ΔW's singular values with random
directions on both sides, so of the same norm.</li>
<li><b>Effective rank.</b> exp of the entropy of σ/Σσ (Roy and Vetterli, EUSIPCO 2007).
<b>Stable rank.</b> Σσ²/σ₁². <b>90% energy rank.</b> Fewest σ that hold 90% of Σσ²
(<a href="https://arxiv.org/abs/2405.09673">arXiv 2405.09673</a>, section 4.6).
<b>Numerical rank.</b> How many σ exceed max(in, out)·ε·σ₁, ε of float32.</li>
<li><b>Scale.</b> ΔW = s·a·b with s = α/r, or α/√r
(<a href="https://arxiv.org/abs/2312.03732">arXiv 2312.03732</a>), or fixed; spectra and norms
include it, directions do not depend on it.</li>
"""

SEARCHES = """
<li><b>Intrinsic dimension.</b> θ = θ₀ + Pθ_d with P frozen and random: the smallest d that reaches
a share (90% for d90) of full fine-tuning (Li et al.,
<a href="https://arxiv.org/abs/1804.08838">arXiv 1804.08838</a>, section 2; Aghajanyan et al.,
<a href="https://arxiv.org/abs/2012.13255">arXiv 2012.13255</a>). Of a score the share is that of
its value; of a loss, that of its improvement over no training, which is our reading.</li>
<li><b>Full fine-tuning.</b> The best of its learning rates by the mean over seeds.</li>
<li><b>Learning rate.</b> Chosen for each dimension by the mean over seeds, on the same eval set, so
it flatters both sides a little.</li>
<li><b>Crossing.</b> Each seed's values are made monotone in d by isotonic regression and followed
linearly in log d to what is needed. Estimate: geometric mean over seeds; interval: Student's t on
log d, n − 1 degrees of freedom. It covers the seeds alone, not the choice of the data or of the
learning rates.</li>
<li><b>Refinement.</b> Dimensions between the largest up to which every seed fails and the smallest
from which on every seed succeeds, at the two best learning rates of the nearest one before.</li>
"""


def section(*texts: str) -> Section:
    return Section("Method notes", f"<ul>{''.join(texts)}</ul>")
