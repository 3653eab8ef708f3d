"""Golden text: one message of every error class, whole."""

from __future__ import annotations

import pytest

from bitwright import errors


@pytest.mark.parametrize(
    "error",
    [
        errors.ModelError,
        errors.DataError,
        errors.PlanError,
        errors.TargetError,
        errors.NumericsError,
        errors.ProofError,
        errors.OutputError,
    ],
)
def test_a_message_has_four_parts(error: type[errors.BitwrightError]) -> None:
    made = error("out/plan.json", expected="a plan", found="a picture", remedy="Give the plan.")

    assert str(made) == "out/plan.json: expected a plan; found a picture. Give the plan."
    assert isinstance(made, errors.BitwrightError)


def test_an_unknown_name_lists_all_of_a_few() -> None:
    made = errors.UnknownName("--target", kind="target", name="bm1685", known=["bm1684", "onnxruntime"])

    assert str(made) == (
        "--target: expected a known target (bm1684, onnxruntime); found 'bm1685'. Did you mean 'bm1684'?"
    )


def test_an_unknown_name_lists_the_nearest_of_many() -> None:
    known = [f"layer{i}.conv" for i in range(20)]
    made = errors.UnknownName("graph", kind="operator", name="layer7.con", known=known)

    assert str(made) == (
        "graph: expected a known operator (layer7.conv, layer17.conv, layer9.conv … (20 in all)); "
        "found 'layer7.con'. Did you mean 'layer7.conv'?"
    )


def test_a_missing_extra_says_what_to_install() -> None:
    made = errors.MissingExtra("bitwright demo", package="scikit-learn", extra="demo")

    assert str(made) == (
        "bitwright demo: expected the package 'scikit-learn'; found it is not installed. "
        "Install it with: pip install 'bitwright[demo]'."
    )


def test_every_error_class_is_in_the_tree_of_the_module_s_docstring() -> None:
    classes = [
        n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.BitwrightError)
    ]

    assert all(name in (errors.__doc__ or "") for name in classes)
