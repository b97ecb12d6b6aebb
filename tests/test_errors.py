"""Messages show no secrets: whatever is raised, noted or listed of an address."""

import fsspec
import pytest

from zoft import errors
from zoft.errors import CardError, ModelError, ZoftError, printable, redacted
from zoft.registry import LocalStore, RemoteStore, open_store

SECRET = "Zq9SecretZq9"
ADDRESSES = [
    f"s3://me:{SECRET}@host/tuners",
    f"ftp://me:p@{SECRET}@host/tuners",
    f"ftp://me:{SECRET}@@host/tuners",
    f"ftp://me:x/{SECRET}@host/tuners",
    f"https://{SECRET}@host/tuners",
    f"https://store.blob.example/c/tuners?sv=2024&se=2027&sig={SECRET}%2Fx%3D",
    f"https://bucket.example/k?X-Amz-Algorithm=A&X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}",
    f"https://bucket.example/k?x-goog-signature={SECRET}",
    f"https://cdn.example/k?Expires=3&Signature={SECRET}&Key-Pair-Id={SECRET}",
    f"https://host/x#access_token={SECRET}",
    f"abfs://c@account.example/x?{SECRET}",
    f"/bucket/k?X-Amz-Signature={SECRET}",
    f"AWS_SECRET_ACCESS_KEY={SECRET}",
    f"password={SECRET}",
    f"Authorization: Bearer {SECRET}{SECRET}",
    f"https://hub/login?next=https%3A%2F%2Fs%2Fk%3Fsig%3D{SECRET}",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("text", ["{}", "cannot open '{}' (HTTP 403)", 'for url "{}"', "<{}>", "a {}\nb"])
def test_no_secret_of_an_address_is_shown(address: str, text: str) -> None:
    message = text.format(address)
    assert SECRET not in redacted(message)
    assert redacted(redacted(message)) == redacted(message)
    for kind in [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, ZoftError)]:
        assert SECRET not in str(kind(message)) + repr(kind(message))


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8080/org/name",
        "s3://bucket/tuners",
        "org/name@7b42fd4 on the Hub",
        "--set options.rank=4, seed=1",
        "pad_token=3 is beyond the embedding",
        "is it a file? yes",
        "significance=0.05",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("address", [one for one in ADDRESSES if "://" in one])
def test_a_store_does_not_show_its_secrets(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in its name, nor in what its driver says of it, whole or in parts."""

    class Driver:
        def invalidate_cache(self) -> None:
            raise OSError(f"refused: {address}, password {SECRET}, path {address.split('://')[1]}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (Driver(), url))
    store = open_store(address)
    assert isinstance(store, RemoteStore) and SECRET not in store.place
    with pytest.raises(CardError) as caught:
        store.entries()
    assert SECRET not in str(caught.value) and "cannot be used" in str(caught.value)


def test_other_errors_keep_their_text() -> None:
    assert str(ModelError("two\nlines")) == "two\nlines"
    assert ZoftError("a", 3).args == ("a", 3)
    assert printable("a\x1b[2J\u202eb é") == "a?[2J?b é"
    assert LocalStore().place.endswith("tuners")
