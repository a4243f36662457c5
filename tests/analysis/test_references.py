"""The analyses on real adapters, against plain numpy from the definitions: the dense dW = B A.

The authors' RoBERTa adapter and a PEFT adapter of GPT-2, through the readers of their formats and
the tables of `updates`. Their bases are not on the machine: where W is needed it is a fixed
Gaussian one of the same shape.
"""

import numpy as np
import pytest
from support import data
from threadpoolctl import threadpool_limits

from lorax.analysis import tables
from lorax.interop import loralib, peft
from lorax.models import gpt2

ATOL = 1e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with threadpool_limits(1, user_api="blas"):
        yield


def roberta():
    """24 adapted matrices, two of them looked at; the scripts' alpha is 16, r = 8."""
    file = data("adapters/lora_roberta_mnli/roberta_base_lora_mnli.npz")
    layer = "roberta.encoder.layer.{}.attention.self.query"
    return loralib.load(file, 16.0).factors, [layer.format(0), layer.format(11)]


def gpt2_adapter():
    factors = peft.load(data("adapters/peft_gpt2_lora"), gpt2.hf_tensors(gpt2.Config())).factors
    return factors, ["h/0/attn/v", "h/11/attn/v"]


@pytest.fixture(scope="module", params=[roberta, gpt2_adapter], ids=["roberta", "gpt2"])
def adapter(request):
    """(factors by path, {path: (A, B, s)} in the paper's (r, in) and (out, r), dense SVDs)."""
    factors, paths = request.param()
    theirs = {
        p: (factors[p].a.T.astype(float), factors[p].b.T.astype(float), factors[p].s) for p in paths
    }
    dense = {p: np.linalg.svd(s * (B @ A), full_matrices=False) for p, (A, B, s) in theirs.items()}
    return factors, theirs, dense


def phi(u1, u2):
    """Equation 4, one (i, j) at a time, of orthonormal columns."""
    values = np.zeros((u1.shape[1], u2.shape[1]))
    for i in range(1, u1.shape[1] + 1):
        for j in range(1, u2.shape[1] + 1):
            values[i - 1, j - 1] = np.linalg.norm(u1[:, :i].T @ u2[:, :j], "fro") ** 2 / min(i, j)
    return values


def test_phi(adapter):
    """Of two layers of one target: A's right singular vectors, B's left ones, both sides of dW."""
    factors, theirs, dense = adapter
    one, other = theirs
    got = tables.similarity([tuple(tables.bases({"both": factors[p]}) for p in theirs)])["both"]
    r1, r2 = got["A"].shape
    right = [np.linalg.svd(A, full_matrices=False)[2].T for A, _, _ in theirs.values()]
    left = [np.linalg.svd(B, full_matrices=False)[0] for _, B, _ in theirs.values()]
    expected = {
        "A": phi(*right),
        "B": phi(*left),
        # B A is (out, in): its right vectors are the input's.
        "dW in": phi(dense[one][2].T[:, :r1], dense[other][2].T[:, :r2]),
        "dW out": phi(dense[one][0][:, :r1], dense[other][0][:, :r2]),
    }
    for kind, values in expected.items():
        np.testing.assert_allclose(got[kind], values, rtol=0, atol=ATOL)


def test_spectra(adapter):
    factors, theirs, dense = adapter
    sigmas, ranks = tables.spectra({0: factors})
    assert len(ranks) == len(factors) and (ranks["layer"] >= 0).all()
    for path, (A, _, _) in theirs.items():
        r, sigma = A.shape[0], dense[path][1]
        got = sigmas[sigmas["path"] == path]["sigma"]
        np.testing.assert_allclose(got, sigma[:r], rtol=0, atol=ATOL)
        row = ranks[ranks["path"] == path].iloc[0]
        p = sigma[sigma > 1e-9] / sigma[sigma > 1e-9].sum()
        assert row["norm"] == pytest.approx(np.linalg.norm(sigma), abs=ATOL)
        assert row["effective"] == pytest.approx(np.exp(-np.sum(p * np.log(p))), abs=ATOL)
        assert row["stable"] == pytest.approx(np.sum(sigma**2) / sigma[0] ** 2, abs=ATOL)
        held = np.cumsum(sigma**2) / np.sum(sigma**2)
        assert row["energy90"] == 1 + np.argmax(held >= 0.9)
        assert row["numerical"] == np.sum(sigma > max(768, 768) * 2**-23 * sigma[0])


def test_amplification(adapter):
    factors, theirs, dense = adapter
    rng = np.random.default_rng(0)
    kernels = {path: 0.05 * rng.standard_normal((768, 768)) for path in theirs}
    svds = tables.base_svds(kernels)
    table = tables.amplifications({0: {path: factors[path] for path in theirs}}, kernels, svds)
    for path, (A, _, _) in theirs.items():
        r, (U, sigma, Vt) = A.shape[0], dense[path]
        W0 = kernels[path].T  # (out, in), as the paper has it
        row = table[table["path"] == path].iloc[0]
        inside = np.linalg.norm(U[:, :r].T @ W0 @ Vt[:r].T)
        assert row["delta_norm"] == pytest.approx(np.linalg.norm(sigma), abs=ATOL)
        assert row["w_in_delta"] == pytest.approx(inside, abs=ATOL)
        assert row["factor"] == pytest.approx(np.linalg.norm(sigma) / inside, abs=ATOL)
        # U and V from W0: its largest sigma^2 are the largest eigenvalues of W0 W0^T.
        own = np.linalg.eigvalsh(W0 @ W0.T)[-r:]
        assert row["w_in_w"] == pytest.approx(np.sqrt(np.sum(own)), abs=ATOL)


def test_figure_8(adapter):
    factors, theirs, dense = adapter
    path = next(iter(theirs))
    w = 0.05 * np.random.default_rng(1).standard_normal((768, 768))
    w_svd = np.linalg.svd(w, full_matrices=False)
    of = {0: {path: factors[path] for path in theirs}}
    svds = dict.fromkeys(theirs, w_svd)
    got = tables.against_base(of, dict.fromkeys(theirs, w), [0], svds=svds)
    assert set(got) == set(theirs)
    r = theirs[path][0].shape[0]
    left, right = w_svd[2].T, w_svd[0].T  # of w.T, (out, in)
    for i, j in ((1, 1), (2, 40), (r, 76), (r, 768), (3, 2)):
        for side, of_delta, of_w in (
            ("in", dense[path][2].T, right.T),
            ("out", dense[path][0], left),
        ):
            expected = np.linalg.norm(of_delta[:, :i].T @ of_w[:, :j]) ** 2 / min(i, j)
            assert got[path][side][i - 1, j - 1] == pytest.approx(expected, abs=ATOL)


def test_a_foreign_adapter_without_its_model_comes_by_its_modules_names():
    """PEFT's fused c_attn is then one matrix (768, 2304)."""
    factors = peft.load(data("adapters/peft_gpt2_lora")).factors
    sigmas, ranks = tables.spectra({"theirs": factors})
    assert set(ranks["layer"]) == set(range(12)) and set(ranks["member"]) == {"theirs"}
    assert set(ranks["target"]) == {"c_attn", "c_proj"} and len(sigmas) == len(ranks) * 8
    assert factors["transformer.h.0.attn.c_attn"].b.shape[1] == 2304
