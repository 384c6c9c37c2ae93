"""The code that the panel gives receivers to check signatures with does check them."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from dispatcher.domain.signing import new_private_key, new_secret, public_key
from dispatcher.web.panel.endpoint import SNIPPETS
from tests.conftest import connected
from tests.domain.test_signing import make_signer
from tests.store import people
from tests.web.conftest import Site
from tests.web.test_panel import Browser

BODY = b'{"a":1}'
PRIVATE, SECRET = new_private_key(), new_secret()
KEYS = {"Python": SECRET, "Python, v1a": public_key(PRIVATE), "JavaScript, v1a": public_key(PRIVATE)}


def signed() -> dict[str, str]:
    now = int(time.time())
    signature = make_signer([PRIVATE, SECRET]).sign(b"evt_1", b"%d" % now, BODY).decode()
    return {"webhook-id": "evt_1", "webhook-timestamp": str(now), "webhook-signature": signature}


@pytest.mark.parametrize("title", ["Python", "Python, v1a"])
def test_the_python_code_takes_what_is_signed_and_nothing_else(title: str) -> None:
    made: dict[str, Any] = {}
    exec(SNIPPETS[title], made)
    headers = signed()
    made["verify"](KEYS[title], headers, BODY)
    for changed, body in (
        (headers, BODY + b" "),
        (headers | {"webhook-id": "evt_2"}, BODY),
        (headers | {"webhook-timestamp": "1"}, BODY),
    ):
        with pytest.raises(ValueError, match=r"no signature fits|too old"):
            made["verify"](KEYS[title], changed, body)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_javascript_code_for_v1a_does_too(tmp_path: Path) -> None:
    title = "JavaScript, v1a"
    given = json.dumps({"key": KEYS[title], "headers": signed(), "body": BODY.decode()})
    run = (
        "const g = JSON.parse(process.argv[2]); verify(g.key, g.headers, Buffer.from(g.body)); "
        'try { verify(g.key, g.headers, Buffer.from(g.body + " ")); console.log("took it"); } catch (e) { console.log(e.message); }'
    )
    (tmp_path / "check.mjs").write_text(SNIPPETS[title] + run)
    said = subprocess.run(["node", tmp_path / "check.mjs", given], capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stdout.strip()) == (0, "no signature fits"), said.stderr


async def test_a_page_has_the_code_and_the_key_for_the_scheme_that_it_is_signed_in(web: Site) -> None:
    async with connected(web.dsn) as db:
        plain = await people.endpoint(db)
    key = await web.key("acct")
    config = {"url": "https://example.com/hook", "event_types": ["*"], "signing": "v1a"}
    answer = await web.ask("POST", "/api/v1/endpoints", key=key, json=config)
    assert answer.status == 201, answer.text
    customer = Browser(web, *await web.login(key))
    page = (await customer.get(f"/endpoints/{answer.json['id']}")).text
    assert answer.json["public_keys"][0] in page.replace("&#43;", "+")
    assert ("Ed25519PublicKey" in page, "hmac.compare_digest" in page) == (True, False)
    page = (await customer.get(f"/endpoints/{plain}")).text
    assert ("Ed25519PublicKey" in page, "hmac.compare_digest" in page) == (False, True)
