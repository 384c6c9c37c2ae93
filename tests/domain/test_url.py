"""One reading of a URL: what is accepted and how it is spelled then, what is refused and what the sentence says.

Two second opinions guard against a reading of our own invention: `urllib` must find the same host in what we accept,
and what the C library's `inet_aton` takes for an IPv4 address must never pass as a name. Nothing is resolved.
"""

import socket
from ipaddress import ip_address
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dispatcher.domain.address import AddressPolicy, parse_networks
from dispatcher.domain.url import HOST_CHARS_MAX, URL_CHARS_MAX, Origin, Target, parse_url
from dispatcher.errors import InputError

PUBLIC = AddressPolicy()
OPEN = AddressPolicy(parse_networks("0.0.0.0/0 ::/0"), allow_http=True)
no_deadline = settings(deadline=None)  # a busy machine is no defect


def refusal(text: object, policy: AddressPolicy = PUBLIC) -> str:
    with pytest.raises(InputError) as caught:
        parse_url(text, policy)
    return str(caught.value)


# What is accepted


def test_a_url_is_cut_up_for_a_request():
    assert parse_url("HTTPS://Example.COM.:8443/Hook?a=%20B#there", PUBLIC) == Target(
        url="https://example.com:8443/Hook?a=%20B",
        origin=Origin("https", "example.com", 8443),
        request_target="/Hook?a=%20B",
        host_header="example.com:8443",
        address=None,
    )


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://example.com", "https://example.com/"),
        ("https://example.com?", "https://example.com/?"),
        ("https://example.com?a=b", "https://example.com/?a=b"),
        ("https://example.com#a", "https://example.com/"),
        ("https://example.com/#", "https://example.com/"),
        ("https://example.com/#ü", "https://example.com/"),
        ("https://example.com:443/", "https://example.com/"),
        ("https://example.com:00443/", "https://example.com/"),
        ("https://example.com:80/", "https://example.com:80/"),
        ("http://example.com:80/", "http://example.com/"),
        ("http://example.com:443/", "http://example.com:443/"),
        ("https://example.com:1/", "https://example.com:1/"),
        ("https://example.com:65535/", "https://example.com:65535/"),
        ("https://1.example/", "https://1.example/"),
        ("https://1.2.3.4.example/", "https://1.2.3.4.example/"),
        ("https://0xfg/", "https://0xfg/"),
        ("https://_dmarc.my_team.example/", "https://_dmarc.my_team.example/"),
        ("https://a--b.example/", "https://a--b.example/"),
        ("https://receiver/", "https://receiver/"),
        ("https://bücher.example/", "https://xn--bcher-kva.example/"),
        ("https://BÜCHER。example./", "https://xn--bcher-kva.example/"),
        ("https://faß.example/", "https://xn--fa-hia.example/"),
        ("https://ｅxample.com/", "https://example.com/"),
        ("https://XN--BCHER-KVA.example/", "https://xn--bcher-kva.example/"),
        ("https://8.8.8.8/", "https://8.8.8.8/"),
        ("https://0.0.0.0/", "https://0.0.0.0/"),
        ("https://[2600:0::0:1]:8443/", "https://[2600::1]:8443/"),
        ("https://[2600::AB]", "https://[2600::ab]/"),
        ("https://[64:ff9b::8.8.8.8]/", "https://[64:ff9b::808:808]/"),
    ],
)
def test_a_url_has_one_spelling(text, url):
    assert parse_url(text, OPEN).url == url


@pytest.mark.parametrize(
    "request_target",
    [
        "/a/../b/./c//",
        "/%2e%2E/%zz%",
        "/?a=1&a=2?/:@",
        "/:@!$&'()*+,;=~",
        '/"<>^`{|}',
        "/@evil.example",
        "//evil.example/",
    ],
)
def test_path_and_query_stay_as_they_are(request_target):
    assert parse_url(f"https://example.com{request_target}", PUBLIC).request_target == request_target


@pytest.mark.parametrize(
    ("text", "host", "host_header"),
    [
        ("https://8.8.8.8/", "8.8.8.8", "8.8.8.8"),
        ("https://8.8.8.8:80/", "8.8.8.8", "8.8.8.8:80"),
        ("https://[2600::1]/", "2600::1", "[2600::1]"),
        ("https://[2600::1]:444/", "2600::1", "[2600::1]:444"),
    ],
)
def test_a_literal_address_is_kept_as_an_address(text, host, host_header):
    target = parse_url(text, PUBLIC)
    assert (target.origin.host, target.host_header, target.address) == (host, host_header, ip_address(host))


# What is refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "must be a string"),
        (b"https://example.com/", "must be a string"),
        ("", "in full"),
        ("example.com/hook", "in full"),
        ("//example.com/hook", "in full"),
        ("https:example.com", "in full"),
        ("https:/example.com", "in full"),
        ("https:\\\\example.com", "character 7 is U+005C"),
        ("https://example.com\\@evil.example/", "character 20 is U+005C"),
        (" https://example.com", "character 1 is U+0020"),
        ("https://example.com/a b", "character 22 is U+0020"),
        ("https://example.com/\n", "U+000A"),
        ("https://example.com/\r\nHost: evil.example", "U+000D"),
        ("https://example.com/#\t", "U+0009"),
        ("https://example.com/\0", "U+0000"),
        ("https://example.com/\x7f", "U+007F"),
        ("https://exam\u200bple.com/", "U+200B"),
        ("https://exam\u202eple.com/", "U+202E"),
        ("https://exam\u3000ple.com/", "U+3000"),
        ("https://exam\ud800ple.com/", "U+D800"),
        ("https://example.com/ü", "percent-encode"),
        ("https://example.com/?ü", "percent-encode"),
        ("ftp://example.com/", "scheme is ftp; use https"),
        ("javascript://example.com/", "use https"),
        ("https+unix://example.com/", "use https"),
        ("https://user@example.com/", "remove it"),
        ("https://user:password@example.com/", "remove it"),
        ("https://@example.com/", "remove it"),
        ("https://example.com:443@evil.example/", "remove it"),
        ("https:///hook", "no host"),
        ("https://:443/", "no host"),
        ("https://?a", "no host"),
        ("https://example.com:/", "port"),
        ("https://example.com:0/", "port"),
        ("https://example.com:65536/", "port"),
        ("https://example.com:000443/", "port"),
        ("https://example.com:+443/", "port"),
        ("https://example.com:４４３/", "port"),
        ("https://example.com:https/", "port"),
        ("https://exam%70le.com/", "percent sign"),
        ("https://127%2e0.0.1/", "percent sign"),
        ("https://[fe80::1%25eth0]/", "without its zone"),
        ("https://[fe80::1%eth0]/", "without its zone"),
        ("https://./", "labels"),
        ("https://example.com../", "labels"),
        ("https://.example.com/", "labels"),
        ("https://a..example/", "labels"),
        ("https://-a.example/", "labels"),
        ("https://a-.example/", "labels"),
        ("https://a!b.example/", "labels"),
        ("https://*.example/", "labels"),
        (f"https://{'a' * 64}.example/", "labels"),
        ("https://a..ü/", "international"),
        ("https://a_ü.example/", "international"),
        ("https://％６１.example/", "international"),
        ("https://example.com／ü/", "international"),
        ("https://℀.example/", "international"),
        (f"https://{'ü' * 64}.example/", "international"),
        ("https://2600::1/", "needs brackets"),
        ("https://[2600::1/", "brackets"),
        ("https://2600::1]/", "brackets"),
        ("https://a[2600]/", "brackets"),
        ("https://[2600::1]a/", "brackets"),
        ("https://[2600::1][2600::2]/", "brackets"),
        ("https://[]/", "not an IPv6 address"),
        ("https://[2600::g]/", "not an IPv6 address"),
        ("https://[8.8.8.8]/", "not an IPv6 address"),
        ("https://[v1.a]/", "not an IPv6 address"),
    ],
)
def test_a_bad_url_is_refused_with_its_trouble(text, words):
    assert words in refusal(text)


@pytest.mark.parametrize(
    "secret", ["https://:hunter2@h/", "https://h/hunter2 ", "https://h/hunter2ü", "https://h:hunter2/"]
)
def test_a_refusal_keeps_secrets(secret):
    assert "hunter2" not in refusal(secret)


# IPv4 in disguise


@pytest.mark.parametrize(
    ("host", "canonical"),
    [
        ("127.1", "127.0.0.1"),
        ("127.0.1", "127.0.0.1"),
        ("127.0.0.1.", "127.0.0.1"),
        ("8.8.8.8.", "8.8.8.8"),
        ("0177.0.0.1", "127.0.0.1"),
        ("127.0.0.01", "127.0.0.1"),
        ("127.0.0.00", "127.0.0.0"),
        ("010.8.8.8", "8.8.8.8"),
        ("0x7f.1", "127.0.0.1"),
        ("0X7F.0.0.1", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
        ("0x7f000001.", "127.0.0.1"),
        ("017700000001", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("134744072", "8.8.8.8"),
        ("0", "0.0.0.0"),
        ("0x", "0.0.0.0"),
        ("8.526344", "8.8.8.8"),
        ("8.8.2056", "8.8.8.8"),
        ("4294967295", "255.255.255.255"),
        ("255.16777215", "255.255.255.255"),
        ("255.255.65535", "255.255.255.255"),
        ("１２７.０.０.１", "127.0.0.1"),
        ("8。8．8｡8", "8.8.8.8"),
        ("①②⑦.1", "127.0.0.1"),
        ("０ｘ7f.1", "127.0.0.1"),
        ("[::ffff:8.8.8.8]", "8.8.8.8"),
        ("[0:0::FFFF:7f00:1]", "127.0.0.1"),
    ],
)
def test_another_spelling_of_an_ipv4_address_is_answered_with_the_usual_one(host, canonical):
    assert f"is an unusual spelling of {canonical}: write {canonical}." in refusal(f"https://{host}/", OPEN)


@pytest.mark.parametrize(
    "host",
    [
        "256.1.1.1",
        "1.256.1.1",
        "1.1.1.256",
        "1.1.65536",
        "1.16777216",
        "4294967296",
        "1.2.3.4.5",
        "1.2.3.4.0",
        "08.8.8.8",
        "1..2",
        "example.1",
        "example.0x1",
        "example.0x",
        "example.08",
        "example.1.",
        "1.0xg.1",
        "ü.1",
        "9" * HOST_CHARS_MAX,
    ],
)
def test_a_name_that_ends_in_a_number_is_no_name(host):
    assert "ends in a number" in refusal(f"https://{host}/", OPEN)


@no_deadline
@given(st.text(alphabet="0123456789abfx.X", min_size=1, max_size=20))
@example("127.1")
@example("0x7F.0.0.01")
@example("0377.0xff.65535")
def test_what_the_c_library_takes_for_an_address_is_never_a_name(host):
    try:
        theirs = ip_address(socket.inet_aton(host))
    except OSError:
        return
    try:
        ours = str(parse_url(f"https://{host}/", OPEN).address)
    except InputError as error:
        ours = str(error)
    assert ours == host == str(theirs) or f"write {theirs}." in ours


# Policy


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "[::1]", "[fd00::1]", "[64:ff9b::10.0.0.1]"]
)
def test_a_literal_address_goes_through_the_guard(host):
    reason = PUBLIC.refusal(host.strip("[]"))
    assert reason is not None
    assert refusal(f"https://{host}/") == f"The URL's address is refused: {reason}."
    assert parse_url(f"https://{host}/", OPEN).address == ip_address(host.strip("[]"))


PRIVATE = AddressPolicy(parse_networks("10.0.0.0/8"))


@pytest.mark.parametrize(
    ("host", "policy"),
    [
        ("example.com", AddressPolicy(allow_http=True)),
        ("8.8.8.8", AddressPolicy(allow_http=True)),
        ("internal", PRIVATE),  # perhaps inside: its addresses decide when they are known
        ("10.0.0.1", PRIVATE),
    ],
)
def test_plain_http_where_the_operator_lets_it(host, policy):
    assert parse_url(f"http://{host}/", policy).origin == Origin("http", host, 80)


@pytest.mark.parametrize(("host", "policy"), [("example.com", PUBLIC), ("8.8.8.8", PUBLIC), ("8.8.8.8", PRIVATE)])
def test_plain_http_elsewhere_is_refused(host, policy):
    assert "DISPATCHER_ALLOW_HTTP" in refusal(f"http://{host}/", policy)


# Bounds


def test_the_length_of_a_url_is_bounded():
    longest = "https://example.com/".ljust(URL_CHARS_MAX, "a")
    assert parse_url(longest, PUBLIC).url == longest
    assert f"has {URL_CHARS_MAX + 1} characters" in refusal(longest + "a")


@pytest.mark.parametrize("start", ["https://example.com?", "https://ü.example/"])
def test_a_url_that_grows_past_the_bound_is_refused(start):
    assert f"the most is {URL_CHARS_MAX}" in refusal(start.ljust(URL_CHARS_MAX, "a"))


def test_the_length_of_a_host_is_bounded():
    longest = ".".join(["a" * 63] * 3 + ["a" * 61])
    assert len(longest) == HOST_CHARS_MAX
    assert parse_url(f"https://{longest}./", PUBLIC).origin.host == longest
    assert "longer than" in refusal(f"https://a{longest}/")
    assert "longer than" in refusal(f"https://{'ü.' * 127}a/")
    assert "international" in refusal(f"https://{'ü.' * 100}a/")  # short enough as given, too long as A-labels


# Properties

label = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,20}[A-Za-z0-9_])?", fullmatch=True)
name = st.builds(
    lambda labels, dot: ".".join([*labels, "Example"]) + dot, st.lists(label, max_size=3), st.sampled_from(["", "."])
)
international = st.sampled_from(["bücher.example", "例え.テスト", "ΑΒΓ.example", "اختبار.example", "ｅxample。com"])
ipv4 = st.ip_addresses(v=4).map(str)
ipv6 = (
    st.ip_addresses(v=6)
    .filter(lambda address: address.ipv4_mapped is None)
    .map(lambda address: f"[{address.exploded}]")
)
port = st.one_of(st.just(""), st.sampled_from([":80", ":443"]), st.integers(1, 65535).map(":{}".format))
visible = st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="\\#")
rest = st.one_of(st.just(""), st.builds("{}{}".format, st.sampled_from("/?#"), st.text(visible, max_size=40)))
urls = st.builds(
    "{}://{}{}{}".format,
    st.sampled_from(["https", "http", "HTTPS"]),
    st.one_of(name, international, ipv4, ipv6),
    port,
    rest,
)
# Text that comes close: pieces that mean something to one parser or another, between arbitrary characters.
pieces = st.sampled_from(
    [
        "https://",
        "http:",
        "//",
        "@",
        ":",
        ":443",
        "[",
        "]",
        "::1",
        "%25",
        "%",
        "?",
        "#",
        ".",
        "xn--",
        "127.0.0.1",
        "0x",
        "１",
        "。",
    ]
)
near_misses = st.builds(
    "{}{}".format, st.sampled_from(["", "https://"]), st.lists(st.one_of(pieces, st.text(max_size=3))).map("".join)
)


@no_deadline
@given(urls)
def test_good_urls_are_accepted_in_one_spelling_that_stays(text):
    target = parse_url(text, OPEN)
    assert parse_url(target.url, OPEN) == target
    assert target.url == f"{target.origin.scheme}://{target.host_header}{target.request_target}"


@no_deadline
@given(st.one_of(st.text(), near_misses))
@example("https://xn--/")
@example("https://\u00ad/")
@example("https://[::1")
def test_any_text_is_refused_or_read_once_and_for_all(text):
    try:
        target = parse_url(text, OPEN)
    except InputError:
        return
    assert parse_url(target.url, OPEN) == target


@no_deadline
@given(st.one_of(urls, near_misses))
def test_what_goes_into_the_request_head_is_visible_ascii(text):
    try:
        target = parse_url(text, OPEN)
    except InputError:
        return
    for part in (target.url, target.request_target, target.host_header, target.origin.host):
        assert part
        assert all("!" <= character <= "~" for character in part)
    assert target.request_target.startswith("/")
    assert "#" not in target.url


@no_deadline
@given(st.one_of(urls, near_misses))
def test_urllib_finds_the_same_host_and_port(text):
    try:
        target = parse_url(text, OPEN)
    except InputError:
        return
    theirs = urlsplit(target.url)
    assert (theirs.scheme, theirs.hostname) == (target.origin.scheme, target.origin.host)
    assert (theirs.port or {"https": 443, "http": 80}[theirs.scheme]) == target.origin.port
    assert theirs.username is None


@no_deadline
@given(st.one_of(ipv4, ipv6))
def test_a_literal_is_accepted_exactly_if_the_guard_accepts_it(host):
    allowed = PUBLIC.refusal(host.strip("[]")) is None
    try:
        accepted = parse_url(f"https://{host}/", PUBLIC).address is not None
    except InputError:
        accepted = False
    assert accepted == allowed
