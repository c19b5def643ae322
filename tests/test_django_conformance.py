"""Django's own tests of caches, unmodified, on this backend: those that Django runs for every backend, and the rest.

They are in Django's source distribution and not in the wheel, so the network is needed for them, and a minute: they run
when `PERSISTENCY_INSTALL` is set, for the version of Django that is installed here.

| what | on what |
|---|---|
| `BaseCacheTests`, the tests of every backend | shared by processes; alone; and through the async forms of the verbs |
| every other class whose settings name `LocMemCache` | the same settings, with this backend in its place |

Left out are the tests of one backend's own ways: memcached, Redis, database tables, `FileBasedCacheTests` (of its
files), and `LocMemCacheTests`: of its attributes, and of an order of age that reading changes, while here only writing
does, as a read writes nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import django
import pytest

TOP = Path(__file__).parent.parent
INSTALL = bool(os.environ.get("PERSISTENCY_INSTALL"))

SETTINGS = """
SECRET_KEY = "conformance"
USE_TZ = False
LANGUAGE_CODE = "en"  # as Django's own runner has it
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions", "cache"]
DATABASES = {name: {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"} for name in ("default", "other")}
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
ROOT_URLCONF = "suite"
"""

# The classes, each made of one of Django's by other settings alone.
SUITE = """
import json
import sys
import tempfile
import unittest
from copy import deepcopy
from inspect import iscoroutinefunction

import django

sys.modules["suite"] = sys.modules["__main__"]  # the settings name a class and the URLs of this file
django.setup()

from asgiref.sync import async_to_sync
from cache import tests
from cache import tests_async
from django.core.cache import cache, caches
from django.test import TestCase, override_settings
from django.test.runner import DiscoverRunner

from persistency.integrations.django import PersistencyCache

urlpatterns = []
ROOT = tempfile.mkdtemp()
LOCMEM = "django.core.cache.backends.locmem.LocMemCache"
OURS = "persistency.integrations.django.PersistencyCache"


def through(name):
    def call(self, *args, **named):
        return async_to_sync(getattr(super(ThroughAsync, self), "a" + name))(*args, **named)
    return call


class ThroughAsync(PersistencyCache):
    '''Every verb is done by its async form.'''


VERBS = [name[1:] for name in dir(PersistencyCache) if iscoroutinefunction(getattr(PersistencyCache, name))]
assert len(VERBS) > 15, VERBS
# What the inherited async forms of other verbs call are async forms themselves.
for verb in VERBS:
    if verb != "close":
        setattr(ThroughAsync, verb, through(verb))


def settings_of(location, backend=OURS, **options):
    found = tests.caches_setting_for_tests(BACKEND=backend, LOCATION=ROOT + "/" + location)
    for one in found.values():
        one["OPTIONS"] = {**one.get("OPTIONS", {}), **options}
    return found


@override_settings(CACHES=settings_of("shared"))
class SharedTests(tests.BaseCacheTests, TestCase):
    pass


@override_settings(CACHES=settings_of("alone", SHARED=False))
class AloneTests(tests.BaseCacheTests, TestCase):
    pass


@override_settings(CACHES=settings_of("async", backend="suite.ThroughAsync"))
class AsyncTests(tests.BaseCacheTests, TestCase):
    pass


found = [SharedTests, AloneTests, AsyncTests]
for name, cls in vars(tests).items():
    settings = getattr(cls, "_overridden_settings", None) or {}
    kinds = {one.get("BACKEND") for one in settings.get("CACHES", {}).values()}
    if kinds == {LOCMEM} and name != "LocMemCacheTests":
        changed = deepcopy(settings["CACHES"])
        for one in changed.values():
            one.update(BACKEND=OURS, LOCATION=ROOT + "/" + name + one.get("LOCATION", ""))
        found.append(override_settings(CACHES=changed)(type("On" + name, (cls,), {"__module__": "suite"})))

if __name__ == "__main__":

    class Result(unittest.TextTestResult):
        passed = []

        def addSuccess(self, test):
            super().addSuccess(test)
            self.passed.append(test.id())

    class Runner(DiscoverRunner):
        def build_suite(self, *args, **named):
            load = unittest.defaultTestLoader.loadTestsFromTestCase
            return unittest.TestSuite(load(cls) for cls in found)

        def get_resultclass(self):
            return Result

        def suite_result(self, suite, result, **named):
            names = lambda pairs: {test.id(): why for test, why in pairs}
            bad = {**names(result.failures), **names(result.errors)}
            wanted = {cls.__name__: unittest.defaultTestLoader.getTestCaseNames(cls) for cls in found}
            told = {"wanted": wanted, "passed": Result.passed, "bad": bad, "skipped": names(result.skipped)}
            with open("result.json", "w") as file:
                json.dump(told, file)
            return len(bad)

    sys.exit(bool(Runner(verbosity=1, interactive=False).run_tests([])))
"""


def unpacked(to: Path) -> Path:
    """Download Django's source distribution, of the version installed here, and give the directory of its tests."""
    asked = ["--no-deps", "--no-binary", "Django", f"Django=={django.__version__}", "--dest", str(to)]
    subprocess.run([sys.executable, "-m", "pip", "-q", "download", *asked], check=True, timeout=300)
    (packed,) = to.glob("*.tar.gz")
    with tarfile.open(packed) as file:
        file.extractall(to, filter="data")
    (tests,) = to.glob("*/tests")
    return tests


@pytest.mark.skipif(not INSTALL, reason="downloads Django's source distribution: set PERSISTENCY_INSTALL=1")
@pytest.mark.timeout(900)
def test_django_s_own_cache_tests_pass(tmp_path: Path) -> None:
    """Each test of each class passes; none is skipped."""
    tests = unpacked(tmp_path)
    (tmp_path / "settings.py").write_text(SETTINGS)
    (tmp_path / "suite.py").write_text(SUITE)
    path = os.pathsep.join([str(TOP), str(tests), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": path, "DJANGO_SETTINGS_MODULE": "settings", "TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "suite.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert (tmp_path / "result.json").exists(), ended.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["bad"] == {}, "\n".join(result["bad"].values())
    assert ended.returncode == 0, ended.stderr
    by_class: dict[str, set[str]] = {}
    for name in result["passed"]:
        _, cls, test = name.rsplit(".", 2)
        by_class.setdefault(cls, set()).add(test)
    assert {cls: sorted(names) for cls, names in by_class.items()} == result["wanted"]
    assert result["skipped"] == {}
    assert by_class["SharedTests"] == by_class["AloneTests"] == by_class["AsyncTests"]
    assert len(by_class["SharedTests"]) >= 50
    assert {"OnCacheMiddlewareTest", "OnTestWithTemplateResponse", "OnCacheI18nTest", "OnCacheUtils"} <= by_class.keys()
