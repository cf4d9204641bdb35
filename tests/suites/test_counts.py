"""The page's table is the counts of the last `make suites`, in which nothing failed."""

import json

from suites.count import PAGE, RESULTS, counts, table


def test_the_page_has_the_counts():
    results = json.loads(RESULTS.read_text())
    assert table(results) in PAGE.read_text(encoding="utf-8")
    assert not any(of["failed"] for of in results.values())
    assert all(of["listed"] <= 4 for suite, of in results.items() if "/" in suite)  # of a model


REPORT = """<testsuites><testsuite>
<testcase classname="tests.suites.test_hope.TestLevels" name="test_a"/>
<testcase classname="tests.suites.test_hope.TestLevels" name="test_b"><skipped type="pytest.skip"/></testcase>
<testcase classname="tests.suites.test_hope.TestLevels" name="test_c"><skipped type="pytest.xfail"/></testcase>
<testcase classname="tests.suites.test_hope.TestLevels" name="test_d"/>
<testcase classname="tests.suites.test_hope.TestLevels" name="test_d [HopeModel]"><failure/></testcase>
<testcase classname="tests.suites.test_peft" name="test_e[selfmod]"/>
</testsuite></testsuites>"""


def test_a_report_is_counted(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    found = counts(tmp_path / "report.xml")
    assert found["hope/Levels"] == dict(passed=1, listed=1, skipped=1, failed=1)
    assert found["peft"] == dict(passed=1, listed=0, skipped=0, failed=0)


def test_the_suites_are_those_of_the_version_in_use():
    root = PAGE.parents[1]
    wanted = (root / "tests/suites/requirements.txt").read_text().splitlines()[1].split()[0]
    assert wanted in (root / "constraints.txt").read_text().splitlines()
