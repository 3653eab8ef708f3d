"""From flags to `Settings`."""

from __future__ import annotations

from typing import cast, get_args

from bitwright.cli.options import DataFlags, QuantizeFlags
from bitwright.cli.search_options import SearchFlags
from bitwright.data.images import ImageOptions
from bitwright.data.parse import parse_dtype, parse_floats, parse_named_shapes, parse_shape, parse_size
from bitwright.errors import DataError, UnknownName
from bitwright.flow.exports import for_exports
from bitwright.flow.model_source import import_object, source_text
from bitwright.flow.settings import Export, SearchMethod, Settings
from bitwright.plan.cost import parse_budget
from bitwright.plan.target import PRECISIONS, Precision
from bitwright.search.losses import LOSSES, UserFunction
from bitwright.search.similarity import PostProcess

_DEFAULT = Settings()


def settings_of(
    data: DataFlags,
    quantize: QuantizeFlags,
    search: SearchFlags | None = None,
    *,
    max_float_ops: int | None = None,
    evaluate: str | None = None,
    export: Export = _DEFAULT.export,
) -> Settings:
    """The settings that the flags ask for. *raises* the error of the first flag that cannot be read."""
    is_search, search = search is not None, search or SearchFlags()
    post_process, source = _post_process(search.post_process)
    loss, loss_source = _loss(search.loss)
    cost, budget = (_DEFAULT.cost, None) if search.budget is None else parse_budget(search.budget)
    method, search_method = (
        _methods(quantize.method) if is_search else (quantize.method, _DEFAULT.search_method)
    )
    found = Settings(
        target=quantize.target,
        method=method,
        methods=_names(search.methods),
        expected_cos=_DEFAULT.expected_cos if search.expected_cos is None else search.expected_cos,
        input_num=data.input_num,
        inference_num=search.inference_num,
        max_float_ops=max_float_ops,
        seed=data.seed,
        device=data.device,
        labels=data.labels,
        calibration_data=data.calibration_data,
        input_shapes=parse_named_shapes(data.input_shape or ()),
        image=_image(data),
        bin_shape=None if data.bin_shape is None else parse_shape(data.bin_shape),
        bin_dtype=_checked_dtype(data.bin_dtype),
        output_weights=_weights(search.output_weights),
        post_process=post_process,
        post_process_source=source,
        cosine_scale=search.cosine_scale,
        save_state=search.save_state,
        search_method=search_method,
        probes=search.probes,
        verify=search.verify,
        loss=loss,
        loss_source=loss_source,
        operators=() if search.operators is None else _listed(search.operators),
        precisions=_precisions(search.precisions),
        cost=cost,
        budget=budget,
        workers=search.workers,
        ray=search.ray,
        evaluate=evaluate,
        export=export,
    )
    return for_exports(found)


def refuse_unused(job: str, search: SearchFlags, *fields: str, **given: bool) -> None:
    """*raises* `DataError` if a flag was given that *job* would ignore: one of *fields*, or a name that is *given*."""
    changed = {f"--{f}": getattr(search, f) != getattr(SearchFlags(), f) for f in fields}
    for flag in (name for name, there in {**changed, **given}.items() if there):
        raise DataError(
            flag, expected=f"a flag of {job}", found="one that it has no use for", remedy="Leave it out."
        )


def refuse_method(job: str, quantize: QuantizeFlags) -> None:
    """*raises* `DataError` if a threshold method was given to *job*, whose plan has all thresholds."""
    refuse_unused(job, SearchFlags(), **{"--method": quantize.method != QuantizeFlags().method})


def _methods(text: str) -> tuple[str, SearchMethod]:
    """`kl,sketch` as (threshold method, how operators are measured)."""
    words = _listed(text)
    searches = [w for w in words if w in get_args(SearchMethod)]
    thresholds = [w for w in words if w not in searches]
    if not words or len(searches) > 1 or len(thresholds) > 1:
        raise DataError(
            "--method",
            expected="at most one threshold method and one of sketch, exact, sketch+verify",
            found=repr(text),
            remedy="Example: --method kl,sketch.",
        )
    method = thresholds[0] if thresholds else _DEFAULT.method
    return method, cast(SearchMethod, searches[0]) if searches else _DEFAULT.search_method


def _listed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _precisions(text: str) -> tuple[Precision, ...]:
    names = _listed(text)
    if not names:
        raise DataError(
            "--precisions", expected=", ".join(PRECISIONS), found=repr(text), remedy="Name at least one."
        )
    for name in names:
        if name not in PRECISIONS:
            raise UnknownName("--precisions", kind="precision", name=name, known=PRECISIONS)
    return cast(tuple[Precision, ...], names)


def _loss(text: str) -> tuple[str | UserFunction, str]:
    """A loss by name, or a user's function and the text that it came from."""
    if not text.rpartition(":")[0]:
        LOSSES.get(text, where="--loss")
        return text, ""
    found = import_object(text, "--loss")
    if not callable(found):
        raise DataError(
            f"--loss {text}",
            expected="a function of (output, float output)",
            found=type(found).__name__,
            remedy="Name a function that returns one number per sample.",
        )
    return found, source_text(text)


def _image(data: DataFlags) -> ImageOptions:
    return ImageOptions(
        resize=None if data.resize is None else parse_size(data.resize, where="--resize"),
        crop=None if data.crop is None else parse_size(data.crop, where="--crop"),
        mean=parse_floats(data.mean, where="--mean"),
        scale=parse_floats(data.scale, where="--scale"),
        pixel_format=data.pixel_format,
        layout=data.layout,
    )


def _checked_dtype(text: str | None) -> str | None:
    if text is not None:
        parse_dtype(text)
    return text


def _names(text: str) -> tuple[str, ...]:
    """`max,kl` as names; each once."""
    names = _listed(text)
    if not names:
        raise DataError(
            "--methods",
            expected="threshold methods separated by commas",
            found=repr(text),
            remedy="Example: --methods max,percentile,kl.",
        )
    return names


def _weights(text: str | None) -> dict[str, float]:
    """`a=0.3,b=0.7` as numbers by output. An output's name may hold `=`; the last one counts."""
    weights: dict[str, float] = {}
    for part in [] if text is None else text.split(","):
        name, _, number = part.strip().rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not name or not 0 <= weight < float("inf") or name in weights:
            raise DataError(
                "--output-weights",
                expected="output=weight pairs separated by commas, each output once, no weight below 0",
                found=repr(part),
                remedy="Example: --output-weights boxes=0.3,scores=0.7.",
            )
        weights[name] = weight
    return weights


def _post_process(spec: str | None) -> tuple[PostProcess | None, str]:
    """The callable named by *spec*, and the text that it came from."""
    if spec is None:
        return None, ""
    spec = f"{spec}:PostProcess" if spec.endswith(".py") else spec
    found = import_object(spec, "--post-process")
    if isinstance(found, type):
        try:
            found = found()
        except Exception as e:
            raise DataError(
                f"--post-process {spec}",
                expected="a class that needs no arguments",
                found=f"{type(e).__name__}: {e}",
                remedy="Give its constructor's parameters defaults.",
            ) from e
    if not callable(found):
        raise DataError(
            f"--post-process {spec}",
            expected="a function, or a class with __call__, of a dictionary of arrays",
            found=type(found).__name__,
            remedy="Add def __call__(self, outputs).",
        )
    return found, source_text(spec)
