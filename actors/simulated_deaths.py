"""How many simulated engines of an application may still die: kept in Ray's own store, since the dead forget."""

from __future__ import annotations

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

_NAMESPACE = b"raygym-simulated-deaths"


def claim_death(app: str, deaths: int | None) -> bool:
    """Take one of the deaths that are left; None: there is always one."""
    return deaths is None or any(
        # Ray says whether the key was there before.
        not _internal_kv_put(_key(app, death), b"", overwrite=False, namespace=_NAMESPACE)
        for death in range(deaths)
    )


def forget_deaths(app: str) -> None:
    """An application of this name begins anew."""
    _internal_kv_del(f"{app}/".encode(), del_by_prefix=True, namespace=_NAMESPACE)


def _key(app: str, death: int) -> bytes:
    return f"{app}/{death}".encode()
