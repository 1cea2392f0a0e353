"""The `url` host as the page reads it: places for servers, and lights that tell nobody whose server it is."""

from __future__ import annotations

from pathlib import Path

from engines.url_host import IDLE_WORDS, UrlHost


def test_each_place_has_a_name_and_a_colour_of_its_own(tmp_path: Path) -> None:
    host = UrlHost(tmp_path)
    assert [engine.label for engine in host.engines] == ["Server 1", "Server 2", "Server 3"]
    assert len({engine.colour for engine in host.engines}) == 3
    assert all(engine.as_it_is for engine in host.engines)


def test_the_lights_follow_a_run_and_go_out_after_it(tmp_path: Path) -> None:
    host = UrlHost(tmp_path)
    assert {(one.light, one.phase) for one in host.statuses().values()} == {("down", IDLE_WORDS)}
    with host.in_use():
        host.show("server-1", "ready")
        with host.busy("server-1"):
            with host.busy("server-1"):
                assert host.status("server-1").light == "busy"
            assert host.status("server-1").light == "busy"  # the first request is still there
            assert host.status("server-2").light == "down"
        assert host.status("server-1").light == "ready"
    assert {(one.light, one.phase) for one in host.statuses().values()} == {("down", IDLE_WORDS)}
