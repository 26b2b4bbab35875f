"""What a client holds is released when it says so, and when it is dead."""

from __future__ import annotations

from rlsys.service.leases import HeldKeys, Leases


def test_a_holder_that_does_not_renew_expires_once() -> None:
    now = 0.0
    leases = Leases(300.0, lambda: now)
    leases.renew("dead")
    leases.renew("alive")
    now = 290.0
    leases.renew("alive")
    assert leases.expired() == []
    now = 301.0
    assert leases.expired() == ["dead"] and leases.expired() == []
    now = 400.0
    assert leases.expired() == [], "the one that renewed is alive"


def test_a_key_is_free_when_all_its_holders_have_released_it() -> None:
    held = HeldKeys()
    for holder in ("a", "a", "b"):
        held.hold("key", holder)
    assert not held.release("key", "a") and not held.release("key", "b")
    assert "key" in held and held.release("key", "a") and "key" not in held


def test_releasing_what_is_not_held_changes_nothing() -> None:
    held = HeldKeys()
    held.hold("key", "a")
    assert not held.release("key", "b") and not held.release("other", "a")
    assert "key" in held


def test_a_dead_holders_keys_are_free_unless_others_hold_them() -> None:
    held = HeldKeys()
    held.hold("mine", "dead")
    held.hold("mine", "dead")
    held.hold("ours", "dead")
    held.hold("ours", "alive")
    assert held.release_all("dead") == ["mine"] and held.release_all("dead") == []
    assert "ours" in held and held.release("ours", "alive")


def test_a_key_that_is_gone_is_held_by_nobody() -> None:
    held = HeldKeys()
    held.hold("key", "a")
    held.forget("key")
    held.forget("key")
    assert held.release_all("a") == []
