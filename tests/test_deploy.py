"""What deploy/ holds is valid, and names nothing that isn't there: settings, verbs, metrics, runbooks."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dispatcher import settings as settings_module
from dispatcher.settings import Settings
from tests.observe.build import kept, observed
from tests.rig import rig, until
from tests.test_settings import own_environment
from tests.verbs import every_verb

__all__ = ["own_environment"]

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
UNIT = (DEPLOY / "dispatcher.service").read_text()
RUNBOOKS = (ROOT / "docs" / "runbooks.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
GRACE_S = Settings.model_fields["grace_s"].default


def parsed(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def alerts() -> list[dict[str, Any]]:
    return [rule for group in parsed("prometheus/alerts.yaml")["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana/dispatcher.json").read_text())
    of_panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    of_variables = [one["query"]["query"] for one in dashboard["templating"]["list"] if isinstance(one["query"], dict)]
    return [rule["expr"] for rule in alerts()] + of_panels + of_variables


# Metrics


async def test_every_metric_that_is_named_is_in_a_scrape_of_a_running_engine(dsn: str) -> None:
    async with kept(dsn) as r, observed(r) as o:
        await r.endpoint()
        await r.emit(3)
        await until(lambda: r.engine.counters.delivered == 3 and o.observer.seen is not None)
        text = await o.scrape()
    shown = set(re.findall(r"^([a-z_]+)[{ ]", text, re.MULTILINE))
    named = {name for expr in expressions() for name in re.findall(r"\b(?:dispatcher|process)_[a-z_]+", expr)}
    assert len(named) > 50
    assert named - shown == set()
    labels = set(re.findall(r'([a-z]+)="', text)) | {"job", "instance"}
    for expr in expressions():
        assert set(re.findall(r'([a-z]+)=~?"', expr)) <= labels, expr
        assert set(re.findall(r"\b(?:by|on) \(([^)]*)\)", expr)) <= {
            one for one in re.findall(r"\b(?:by|on) \(([^)]*)\)", expr) if set(one.split(", ")) <= labels | {"le"}
        }, expr


async def test_values_of_labels_that_are_named_exist(dsn: str) -> None:
    async with rig(dsn) as r, observed(r) as o:
        await until(lambda: o.observer.seen is not None)
        text = await o.scrape()
    for expr in expressions():
        for name, inside in re.findall(r"\b(dispatcher_[a-z_]+)\{([^}]*)\}", expr):
            for label, operator, value in re.findall(r'([a-z]+)(=~|!=|=)"([^"$]*)"', inside):
                for one in value.split("|") if operator == "=~" else [value]:
                    assert re.search(rf'^{name}\{{[^}}]*{label}="{re.escape(one)}"', text, re.MULTILINE), (
                        name,
                        label,
                        one,
                    )


# Alerts


def test_every_alert_has_what_somebody_woken_by_it_needs() -> None:
    assert len({rule["alert"] for rule in alerts()}) == len(alerts()) > 15
    for rule in alerts():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        page, anchor = rule["annotations"]["runbook_url"].split("#")
        assert (ROOT / page).exists()
        assert anchor == rule["alert"].lower()


def test_every_alert_has_its_part_of_the_runbooks_and_no_part_is_left_over() -> None:
    assert re.findall(r"^## (\w+)$", RUNBOOKS, re.MULTILINE) == [rule["alert"] for rule in alerts()]
    for anchor in re.findall(r"\(#(\w+)\)", RUNBOOKS):
        assert anchor in {rule["alert"].lower() for rule in alerts()}


def test_every_alert_is_seen_to_fire_and_not_before() -> None:
    """By tests/data/alerts_test.yaml, which promtool runs."""
    cases = [
        case
        for test in yaml.safe_load((ROOT / "tests" / "data" / "alerts_test.yaml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    names = {rule["alert"] for rule in alerts()}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


def promtool(*args: str, cwd: Path = DEPLOY / "prometheus") -> None:
    found = subprocess.run(["promtool", *args], cwd=cwd, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_the_rules_and_fires_when_it_should() -> None:
    promtool("check", "rules", "alerts.yaml")
    promtool("check", "config", "--syntax-only", "scrape.yaml")
    promtool("test", "rules", str(ROOT / "tests" / "data" / "alerts_test.yaml"))


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads((DEPLOY / "grafana/dispatcher.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    for place in places:
        assert place["x"] + place["w"] <= 24
    taken = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(taken)) == len(taken), "panels lie on each other"
    for panel in panels:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all('job=~"$job"' in target["expr"] for target in panel["targets"]), panel["title"]


# Settings and verbs


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_setting_that_is_named_exists(path: Path) -> None:
    for name in re.findall(r"\bDISPATCHER_([A-Z0-9_]+)\b", path.read_text()):
        assert name.lower() in Settings.model_fields, name


def test_the_documents_name_no_setting_that_does_not_exist() -> None:
    for text in (RUNBOOKS, OPERATIONS):
        for name in re.findall(r"`DISPATCHER_([A-Z0-9_]+)", text):
            assert name.lower() in Settings.model_fields or name == "CONFIG", name


VERBS = dict(every_verb())


def is_verb(words: list[str]) -> bool:
    """Tell whether the words begin with a verb's."""
    return any(tuple(words[:n]) in VERBS for n in (1, 2))


def test_every_command_is_a_verb() -> None:
    spec = next(
        doc
        for doc in yaml.safe_load_all((DEPLOY / "kubernetes/dispatcher.yaml").read_text())
        if doc["kind"] == "Deployment"
    )
    pod = spec["spec"]["template"]["spec"]
    commands = [container["args"] for container in pod["containers"] + pod["initContainers"]]
    commands += [service["command"] for service in parsed("compose.yaml")["services"].values() if "command" in service]
    container = (DEPLOY / "Containerfile").read_text()
    commands.append(json.loads(re.findall(r"^CMD (\[.*\])$", container, re.MULTILINE)[-1]))
    (start,) = re.findall(r"^ExecStart=\S+/dispatcher --config \S+ (\w+)$", UNIT, re.MULTILINE)
    commands.append([start])
    assert commands.count(["run"]) == 4
    assert commands.count(["migrate"]) == 2
    assert all(is_verb(command) for command in commands), commands


def test_every_command_in_the_documents_is_a_verb() -> None:
    assert not is_verb(["nothing"])
    for text in (RUNBOOKS, OPERATIONS):
        for line in re.findall(r"(?:`|^)dispatcher (?!--)([a-z][^`\n#]*)", text, re.MULTILINE):
            words = line.split()
            assert is_verb(words), line


def test_the_example_file_is_taken_and_is_nearly_all_defaults() -> None:
    loaded = settings_module.load(DEPLOY / "dispatcher.toml")
    assert loaded.health_listen == "127.0.0.1:9090"
    defaults = {name: field.get_default(call_default_factory=True) for name, field in Settings.model_fields.items()}
    changed = {name for name, default in defaults.items() if getattr(loaded, name) != default}
    assert changed == {"health_listen", "web_listen", "public_url", "web_trusted_proxies", "grace_s"}
    for name in re.findall(r"^# (\w+) = ", (DEPLOY / "dispatcher.toml").read_text(), re.MULTILINE):
        assert name in Settings.model_fields


# systemd


def test_the_unit_waits_for_longer_than_the_grace() -> None:
    (stop_s,) = map(int, re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE))
    grace_s = settings_module.load(DEPLOY / "dispatcher.toml").grace_s
    assert stop_s >= 2 * grace_s
    assert re.search(r"^Type=notify$", UNIT, re.MULTILINE)
    (descriptors,) = map(int, re.findall(r"^LimitNOFILE=(\d+)$", UNIT, re.MULTILINE))
    assert descriptors >= Settings.model_fields["sockets_max"].default + 1_100


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_as_hard_as_the_document_says() -> None:
    found = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", str(DEPLOY / "dispatcher.service")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    score = re.search(r"Overall exposure level for dispatcher\.service: ([0-9.]+)", found.stdout)
    assert score is not None, found.stderr
    told = re.search(r"exposure level ([0-9.]+)", OPERATIONS)
    assert told is not None
    assert float(score[1]) <= float(told[1])


# Containers


def test_kubernetes_takes_the_manifest() -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes/dispatcher.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Deployment", "PodDisruptionBudget", "Service"]
    for document in documents:
        kubernetes_validate.validate(document, "1.31", strict=True)
    pod = documents[0]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    env = {one["name"]: one["value"] for one in container["env"]}
    assert pod["terminationGracePeriodSeconds"] >= 2 * float(env["DISPATCHER_GRACE_S"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert env["DISPATCHER_HEALTH_LISTEN"].endswith(f":{ports['health']}")
    assert env["DISPATCHER_WEB_LISTEN"].endswith(f":{ports['web']}")
    mounted = container["volumeMounts"][0]["mountPath"]
    assert all(value.startswith(mounted) for name, value in env.items() if name.endswith("_FILE"))
    assert container["securityContext"]["readOnlyRootFilesystem"]
    # A Service named `dispatcher` would put DISPATCHER_SERVICE_HOST into the environment, which settings refuse.
    assert documents[0]["spec"]["template"]["spec"]["enableServiceLinks"] is False
    assert documents[0]["spec"]["replicas"] == 2


def test_compose_takes_the_file() -> None:
    """By the Compose specification's own schema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    found = subprocess.run([*command, str(DEPLOY / "compose.yaml")], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_compose_joins_what_it_names() -> None:
    compose = parsed("compose.yaml")
    services = compose["services"]
    for service in services.values():
        assert set(service.get("secrets", ())) <= set(compose["secrets"])
        assert set(service.get("depends_on", ())) <= set(services)
    assert services["dispatcher"]["read_only"] is True
    assert services["dispatcher"]["deploy"]["replicas"] == 2
    assert int(services["dispatcher"]["stop_grace_period"].rstrip("s")) >= 2 * GRACE_S
    for name in ("dispatcher", "web", "migrate"):
        for setting, value in services[name]["environment"].items():
            if setting.endswith("_FILE"):
                assert value.removeprefix("/run/secrets/") in services[name]["secrets"]
    for name in ("dispatcher", "web"):
        assert "/livez" in services[name]["healthcheck"]["test"][-1]
    assert services["web"]["environment"]["DISPATCHER_WEB_LISTEN"].endswith(":8080")
    assert services["web"]["ports"] == ["127.0.0.1:8080:8080"]


def test_the_image_is_small_and_not_root_s() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    assert re.search(r"^USER (?!0|root)\d+", text, re.MULTILINE)
    last = text.rsplit("\nFROM ", 1)[1]
    assert "pip" not in last
    taken = (ROOT / ".dockerignore").read_text().splitlines()
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in copied.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in taken, f"{source} is left out of the build's context"
    assert re.search(r"HEALTHCHECK [^\n]*\\\n[^\n]*:9090/livez", text)
