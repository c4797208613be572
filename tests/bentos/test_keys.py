"""Who may ask /predict: API keys in a folder as the kubelet mounts a Secret, and the token by which our jobs are known."""

from __future__ import annotations

import contextlib
import hmac
import http.client
import json
import logging
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bentos.churn import packaging
from bentos.churn.config import ConfigError, read_config
from bentos.churn.keys import Callers, KeysError, read_keys
from bentos.churn.model import Scorer
from bentos.churn.openapi import describe
from bentos.churn.requests import RequestError
from jobs.check import check
from jobs.database import bentos, connect
from jobs.promote import ask
from jobs.settings import Settings, SettingsError, load_settings
from jobs.supervisor import as_environment
from tests.bentos import serving_process
from tests.bentos.conftest import FeastStore
from tests.bentos.serving_process import Reply, Service, eventually

OLD, NEW, OTHER = "old-key-of-shop-0123456789", "new-key-of-shop-9876543210", "key-of-crm-abcdefghijklmnop"
TOKEN = "the-token-of-our-own-jobs-42"  # noqa: S105
SECRETS = (OLD, NEW, OTHER, TOKEN)


def mount(folder: Path, keys: dict[str, str]) -> None:
    """What the kubelet does with a Secret: a folder that appears at once, by a link, and links that lead through it."""
    folder.mkdir(exist_ok=True)
    whole = folder / f"..{time.monotonic_ns()}"
    whole.mkdir()
    for name, key in keys.items():
        (whole / name).write_text(key)
    (folder / "..new").symlink_to(whole.name)
    (folder / "..new").replace(folder / "..data")
    for link in folder.glob("[!.]*"):
        link.unlink()
    for name in keys:
        (folder / name).symlink_to(f"..data/{name}")


# --- the folder -------------------------------------------------------------------------------------------


def test_a_key_is_the_content_of_a_file_without_the_end_of_its_line(tmp_path: Path) -> None:
    mount(tmp_path / "keys", {"shop": f"{OLD}\n", "crm": OTHER})
    (tmp_path / "plain").mkdir()
    for name, key in (("shop", OLD), ("crm", OTHER), (".hidden", "x")):
        (tmp_path / "plain" / name).write_text(key)

    assert read_keys(tmp_path / "keys") == read_keys(tmp_path / "plain")
    assert list(read_keys(tmp_path / "keys")) == ["crm", "shop"]


def test_all_keys_are_of_one_moment(tmp_path: Path) -> None:
    """The kubelet has exchanged the folder, and not yet the links: a key that goes is not missed, one that comes is there."""
    mount(tmp_path, {"shop": OLD})
    links = [(link.name, link.readlink()) for link in tmp_path.glob("[!.]*")]
    mount(tmp_path, {"shop-2": NEW})
    (tmp_path / "shop-2").unlink()
    for name, target in links:
        (tmp_path / name).symlink_to(target)

    assert list(read_keys(tmp_path)) == ["shop-2"]


UNUSABLE: dict[str, Callable[[Path], object]] = {
    "missing": lambda folder: folder.rmdir(),
    "is empty": lambda folder: folder,
    "hidden": lambda folder: (folder / ".key").write_text(OLD),
    "no content": lambda folder: (folder / "shop").touch(),
    "15 bytes": lambda folder: (folder / "shop").write_text(OLD[:15]),
    "short but for its spaces": lambda folder: (folder / "shop").write_text(f"{OLD[:15]}     "),
    "two lines": lambda folder: (folder / "shop").write_text(f"{OLD}\n{NEW}"),
    "not ASCII": lambda folder: (folder / "shop").write_text(f"{OLD}ü"),
    "too long": lambda folder: (folder / "shop").write_text("x" * 1025),
    "a folder": lambda folder: (folder / "shop").mkdir(),
    "a link that leads nowhere": lambda folder: (folder / "shop").symlink_to("gone"),
    "one of two": lambda folder: [(folder / "crm").write_text(OTHER), (folder / "shop").write_text(OLD[:15])],
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_folder_that_cannot_be_used_is_refused_without_repeating_a_key(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    UNUSABLE[case](folder)

    with pytest.raises(KeysError, match=f"CHURN_API_KEYS_DIR is {folder}, ") as refused:
        read_keys(folder)

    assert not [key for key in (OLD, NEW, OTHER) if key[:8] in str(refused.value)]
    assert "crm" not in str(refused.value)
    assert not {"golden", "sha256", "digest"} & set(str(refused.value).split()), "promotion would blame the bento"


def test_what_becomes_unusable_changes_nothing_and_heals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    mount(tmp_path, {"shop": OLD})
    callers = Callers(tmp_path)

    for keys in ({"shop": "short"}, {}):
        mount(tmp_path, keys)
        callers.look()
        callers.look()
        assert admitted(callers, bearer=OLD)
    mount(tmp_path, {"shop-2": NEW})
    callers.look()

    assert (admitted(callers, bearer=OLD), admitted(callers, bearer=NEW)) == (False, "client")
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in said[:2]] == ["API keys stay as they were"] * 2
    assert said[2:] == ["API keys are now those of shop-2"]
    assert not [key for key in SECRETS if key in caplog.text]


# --- who is let in ----------------------------------------------------------------------------------------


def headers_of(*, bearer: str = "", api_key: str = "", token: str = "") -> list[tuple[bytes, bytes]]:
    found = [(b"host", b"churn")]
    found += [(b"authorization", f"Bearer {bearer}".encode())] if bearer else []
    found += [(b"x-api-key", api_key.encode())] if api_key else []
    found += [(b"x-churn-probe-token", token.encode())] if token else []
    return found


def admitted(callers: Callers, source: str = "client", **shown: str) -> str | bool:
    """The source of such a request, False if it is refused."""
    try:
        return callers.admit(headers_of(**shown), source)
    except RequestError as refused:
        assert (refused.status, refused.code) == (401, "unauthorized")
        assert not [key for key in SECRETS if key in refused.detail]
        return False


@pytest.fixture
def callers(tmp_path: Path) -> Callers:
    mount(tmp_path, {"shop": OLD, "shop-2": NEW, "crm": OTHER})
    return Callers(tmp_path, TOKEN)


def test_each_key_lets_in_and_nothing_like_one_does(callers: Callers) -> None:
    for key in (OLD, NEW, OTHER):
        assert admitted(callers, bearer=key) == admitted(callers, api_key=key) == "client"
        wrong = ["", key[:-1], f"{key}x", key.upper(), key[::-1], f"{key} {key}", TOKEN, "shop", "ü" * 20]
        assert not [shown for shown in wrong if admitted(callers, bearer=shown) or admitted(callers, api_key=shown)]
    assert admitted(callers, bearer="wrong", api_key=OLD)
    assert callers.admit([(b"authorization", f"bEARER   {OLD}".encode())], "client")
    for scheme in ("Basic", "Token", "Bearers", "Bearer:"):
        with pytest.raises(RequestError):
            callers.admit([(b"authorization", f"{scheme} {OLD}".encode())], "client")
    assert callers.requests == {"shop": 4, "shop-2": 2, "crm": 2}


def test_a_probe_is_who_shows_the_token(callers: Callers) -> None:
    assert admitted(callers, "probe", token=TOKEN) == "probe"
    assert admitted(callers, "client", token=TOKEN) == "client"
    assert admitted(callers, "probe", bearer=OLD) == "client"
    assert admitted(callers, "probe", bearer=OLD, token=TOKEN[:-1]) == "client"
    assert admitted(callers, "probe", token=TOKEN[:-1]) is False
    assert admitted(callers, "probe", bearer=TOKEN) is False
    assert callers.requests == {"probe": 2, "shop": 2}


def test_without_keys_the_token_alone_decides_who_is_a_probe(tmp_path: Path) -> None:
    callers = Callers(None, TOKEN)
    assert not callers.required
    assert admitted(callers, "probe", token=TOKEN) == "probe"
    assert admitted(callers, "probe") == admitted(callers, "probe", token=OLD) == "client"
    mount(tmp_path, {"shop": OLD})
    assert admitted(Callers(tmp_path), "probe", bearer=OLD) == "client", "keys without a token: nobody can prove it"


def test_told_nothing_everybody_is_let_in_and_believed() -> None:
    assert admitted(Callers(), "probe") == "probe"
    assert admitted(Callers(), "client") == "client"


def test_every_key_is_compared_whichever_is_shown(callers: Callers, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of hashes, which are all of one length: time tells neither which key was near nor how long it is."""
    compared: list[tuple[bytes, bytes]] = []

    def watched(a: bytes, b: bytes, compare: Callable[[bytes, bytes], bool] = hmac.compare_digest) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr("bentos.churn.keys.hmac.compare_digest", watched)
    counts = set()
    for shown in (OLD, NEW, OTHER, OLD[:-1], "x", ""):
        compared.clear()
        admitted(callers, bearer=shown)
        counts.add(len(compared))
        assert {len(value) for pair in compared for value in pair} == {32}
    assert counts == {4}, "three keys and the token"


# --- settings ---------------------------------------------------------------------------------------------

NEEDED = {"CHURN_DATABASE_URL": "sqlite:////x", "CHURN_ONLINE_STORE_URL": "sqlite:////x", "CHURN_SPOOL_DIR": "/x"}


@pytest.mark.parametrize("token", ["short", f"{TOKEN[:8]}\n{TOKEN}", f"{TOKEN}ü", "x" * 1025])
def test_a_token_that_cannot_be_used_is_not_repeated(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHURN_PROBE_TOKEN", token)
    with pytest.raises(SettingsError, match="CHURN_PROBE_TOKEN is not a usable token; expected 16 to 1,024") as job:
        load_settings()
    with pytest.raises(ConfigError, match="CHURN_PROBE_TOKEN is not a usable token; expected 16 to 1,024") as service:
        read_config({**NEEDED, "CHURN_PROBE_TOKEN": token})

    for message in (str(job.value), str(service.value)):
        assert token not in message
        assert token[:8] not in message


def test_a_relative_folder_of_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service works in another folder than the command that starts it."""
    monkeypatch.setenv("CHURN_API_KEYS_DIR", "keys")
    with pytest.raises(SettingsError, match="CHURN_API_KEYS_DIR is 'keys'; expected an absolute path"):
        load_settings()
    with pytest.raises(ConfigError, match="CHURN_API_KEYS_DIR is 'keys'; expected an absolute path"):
        read_config({**NEEDED, "CHURN_API_KEYS_DIR": "keys"})


def test_settings_show_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHURN_PROBE_TOKEN", f"{TOKEN}\n")
    settings = load_settings()
    config = read_config({**NEEDED, "CHURN_PROBE_TOKEN": f"{TOKEN}\n"})

    assert settings.probe_token.get_secret_value() == config.probe_token == TOKEN
    shown = [repr(settings), str(settings), settings.model_dump_json(), str(settings.probe_token), repr(config)]
    assert not [text for text in shown if TOKEN in text]
    assert as_environment(settings)["CHURN_PROBE_TOKEN"] == TOKEN, "another process is told it"


# --- the service ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of two callers."""
    found = tmp_path_factory.mktemp("keys")
    mount(found, {"shop": OLD, "crm": OTHER})
    return found


@pytest.fixture(scope="module")
def settings_of_it(
    built: packaging.Built, online: FeastStore, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """A service that asks for keys, and a database that has its bento."""
    home = tmp_path_factory.mktemp("guarded")
    database = f"sqlite:///{home}/churn.db"
    row = {"tag": built.tag, "model_version": 1, "run_id": "run-1", "built_at": datetime.now(UTC)}
    with connect(database).begin() as connection:
        connection.execute(bentos.insert().values(sha256=built.sha256, archive=built.archive, **row))
    return serving_process.environment(
        database=database,
        online_store=online.url,
        spool=home / "spool",
        api_keys_dir=str(folder),
        probe_token=TOKEN,
    )


@pytest.fixture(scope="module")
def guarded(bento: Path, settings_of_it: dict[str, str]) -> Iterator[Service]:
    with serving_process.start(bento, settings_of_it) as service:
        yield service
        assert not [key for key in SECRETS if key in service.log]


def predict(service: Service, **headers: str) -> Reply:
    return service.post({"user_id": "u-0001"}, **headers)


def source_of(settings: dict[str, str], reply: Reply) -> str:
    """What the log has of an answered prediction."""
    path = settings["CHURN_DATABASE_URL"].removeprefix("sqlite:///")

    def look() -> list[tuple[str]]:
        with contextlib.closing(sqlite3.connect(path, timeout=10)) as connection:
            query = "SELECT source FROM predictions WHERE prediction_id = ?"
            return connection.execute(query, (reply.json()["prediction_id"],)).fetchall()

    return eventually(look)[0][0]


def test_who_shows_a_key_is_answered_others_are_not(guarded: Service) -> None:
    assert predict(guarded, authorization=f"Bearer {OLD}").status == 200
    assert predict(guarded, x_api_key=OTHER).status == 200
    for headers in ({}, {"authorization": f"Bearer {NEW}"}, {"authorization": OLD}, {"x_api_key": OLD[:-1]}):
        refused = predict(guarded, **headers, x_request_id="who")
        assert refused.status == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.headers["x-request-id"] == "who"
        assert set(refused.json()) == {"error", "detail", "request_id"}
        assert refused.json()["error"] == "unauthorized"


def test_requests_are_counted_by_the_name_of_their_key(guarded: Service) -> None:
    """Before an old key is removed one can see that nobody uses it any more."""

    def counted(name: str) -> float:
        lines = guarded.get("/metrics").body.decode().splitlines()
        line = f'churn_requests_by_key_total{{key="{name}"}} '
        return next((float(found.split()[-1]) for found in lines if found.startswith(line)), 0.0)

    before = [counted(name) for name in ("shop", "crm", "probe")]
    predict(guarded, authorization=f"Bearer {OLD}")
    predict(guarded, authorization=f"Bearer {NEW}")
    predict(guarded, x_churn_probe_token=TOKEN)
    assert [counted(name) - was for name, was in zip(("shop", "crm", "probe"), before, strict=True)] == [1, 0, 1]
    assert not [key for key in SECRETS if key in guarded.get("/metrics").body.decode()]


def test_it_is_refused_before_its_body_is_read(guarded: Service) -> None:
    """None of it has arrived; with a key its sender would be waited for."""

    def answer(key: str) -> bytes:
        head = f"POST /predict HTTP/1.1\r\nHost: churn\r\nAuthorization: Bearer {key}\r\nContent-Length: 1000000\r\n"
        with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
            return connection.recv(65536)

    started = time.monotonic()
    assert answer(NEW).startswith(b"HTTP/1.1 401 ")
    assert time.monotonic() - started < 0.5
    assert answer(OLD).startswith(b"HTTP/1.1 408 ")


def test_all_else_is_asked_without_a_key(guarded: Service) -> None:
    """The kubelet, Prometheus and promotion have none."""
    for path in ("/livez", "/readyz", "/info", "/metrics", "/docs.json"):
        assert guarded.get(path).status == 200
    assert guarded.get("/predict").status == 405


def test_jobs_ask_with_their_token(
    guarded: Service, settings_of_it: dict[str, str], tmp_path: Path, scorer: Scorer
) -> None:
    """As promotion, `churn check` and `helm test` do."""
    settings = Settings(
        home=tmp_path, database_url=settings_of_it["CHURN_DATABASE_URL"], serve_port=guarded.port, probe_token=TOKEN
    )
    assert check(settings).difference <= 1e-6

    with pytest.raises(Exception, match=r"answered 401: .*CHURN_PROBE_TOKEN has to be the service's") as refused:
        check(settings.model_copy(update={"probe_token": Settings().probe_token}))
    assert type(refused.value).__name__ == "_WorldFault", "the model is not to blame"
    assert ask(f"{guarded.url}/info")["bento_tag"] == scorer.bento_tag


def test_only_the_token_makes_a_probe(guarded: Service, settings_of_it: dict[str, str]) -> None:
    """Others would keep their requests out of what drift looks at."""
    ours = predict(guarded, x_churn_source="probe", x_churn_probe_token=TOKEN)
    theirs = predict(guarded, x_churn_source="probe", authorization=f"Bearer {OLD}", x_churn_probe_token=NEW)

    assert source_of(settings_of_it, ours) == "probe"
    assert source_of(settings_of_it, theirs) == "client"


def test_the_document_says_that_a_key_is_needed(guarded: Service, scorer: Scorer) -> None:
    document = guarded.get("/docs.json").json()
    operation = document["paths"]["/predict"]["post"]

    assert operation["security"] == [{"bearer": []}, {"header": []}]
    assert document["components"]["securitySchemes"] == {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    assert operation["responses"]["401"]["content"]["application/json"]["example"]["error"] == "unauthorized"
    assert "WWW-Authenticate" in operation["responses"]["401"]["headers"]
    assert not [path for path, found in document["paths"].items() if "security" in found.get("get", {})]
    without = json.dumps(describe(scorer))
    assert '"401"' not in without
    assert "security" not in without


# --- over time --------------------------------------------------------------------------------------------


class Caller(threading.Thread):
    """Asks without a pause, with the key that it was last given; keeps the statuses by key."""

    def __init__(self, port: int, key: str) -> None:
        super().__init__(daemon=True)
        self.port, self.key, self.over = port, key, False
        self.statuses: dict[str, dict[int, int]] = {}

    def run(self) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            while not self.over:
                key = self.key
                headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
                connection.request("POST", "/predict", b'{"user_id": "u-0001"}', headers)
                with connection.getresponse() as response:
                    response.read()
                counts = self.statuses.setdefault(key, {})
                counts[response.status] = counts.get(response.status, 0) + 1

    def asked(self, key: str, status: int = 200) -> int:
        return self.statuses.get(key, {}).get(status, 0)


def test_keys_are_exchanged_while_requests_flow(bento: Path, settings_of_it: dict[str, str], tmp_path: Path) -> None:
    """Add the new one, move callers, remove the old one: nobody with a key that is valid is refused."""
    keys = tmp_path / "keys"
    mount(keys, {"shop": OLD, "crm": OTHER})
    own = {**settings_of_it, "CHURN_API_KEYS_DIR": str(keys), "CHURN_SPOOL_DIR": str(tmp_path / "spool")}
    with serving_process.start(bento, own) as service:
        worker = service.worker()
        shops, crm = [Caller(service.port, OLD) for _ in range(2)], Caller(service.port, OTHER)
        for caller in (*shops, crm):
            caller.start()
        eventually(lambda: all(shop.asked(OLD) > 50 for shop in shops))
        assert predict(service, x_api_key=NEW).status == 401

        mount(keys, {"shop": OLD, "shop-2": NEW, "crm": OTHER})
        eventually(lambda: predict(service, x_api_key=NEW).status == 200, seconds=20, every=0.2)
        for shop in shops:
            shop.key = NEW
        eventually(lambda: all(shop.asked(NEW) > 50 for shop in shops))
        mount(keys, {"shop-2": NEW, "crm": OTHER})
        eventually(lambda: predict(service, x_api_key=OLD).status == 401, seconds=20, every=0.2)
        mount(keys, {"shop-2": "short"})
        eventually(lambda: "API keys stay as they were" in service.log, seconds=20)
        more = crm.asked(OTHER) + 50
        eventually(lambda: crm.asked(OTHER) > more)

        for caller in (*shops, crm):
            caller.over = True
        for caller in (*shops, crm):
            caller.join(10)
        assert [set(counts) for caller in (*shops, crm) for counts in caller.statuses.values()] == [{200}] * 5
        assert sum(caller.asked(key) for caller in (*shops, crm) for key in caller.statuses) > 500
        assert service.worker() == worker
        assert not [key for key in (*SECRETS, "short,") if key in service.log]


@pytest.mark.parametrize("fault", ["short", "empty", "missing"])
def test_without_usable_keys_it_never_gets_ready_and_answers_nobody(
    bento: Path, settings_of_it: dict[str, str], tmp_path: Path, fault: str
) -> None:
    keys = tmp_path / "keys"
    if fault != "missing":
        mount(keys, {"crm": OTHER, "shop": OLD[:15]} if fault == "short" else {})
    own = {**settings_of_it, "CHURN_API_KEYS_DIR": str(keys), "CHURN_SPOOL_DIR": str(tmp_path / "spool")}
    with serving_process.start(bento, own, wait=False) as service:
        service.wait_answering()
        ready = service.get("/readyz")
        predicted = [predict(service, **headers).status for headers in ({}, {"x_api_key": OTHER})]

        assert ready.status == 503
        said: str = ready.json()["detail"]
        assert said.startswith(f"CHURN_API_KEYS_DIR is {keys}, ")
        assert {"short": "where shop cannot be used", "empty": "is empty", "missing": "cannot be read"}[fault] in said
        assert predicted == [503, 503]
        assert said in service.log
        assert not [key for key in (OTHER, OLD[:15]) if key in service.log or key.encode() in ready.body]


def test_the_token_alone_lets_everybody_in(bento: Path, settings_of_it: dict[str, str], tmp_path: Path) -> None:
    own = {**settings_of_it, "CHURN_API_KEYS_DIR": "", "CHURN_SPOOL_DIR": str(tmp_path / "spool")}
    with serving_process.start(bento, own) as service:
        plain, claimed = predict(service), predict(service, x_churn_source="probe")
        ours = predict(service, x_churn_source="probe", x_churn_probe_token=TOKEN)

        assert [source_of(own, reply) for reply in (plain, claimed, ours)] == ["client", "client", "probe"]
