"""Epidemic series: files of every bad kind, and downloads from a server that fails, forgets and changes its mind."""
import gzip
import hashlib
import os
import re
import threading
import time
import warnings
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import torch

from tformer_lab.data.epidemic import (COUNTRIES, SOURCES, DownloadError, EpidemicSource, download, epidemic_windows, load_series, local_file, prepare, read_table)
from tformer_lab.data.series import split_windows
from tformer_lab.storage import FileError

COVID, HOSPITAL = SOURCES["owid_covid"], SOURCES["rvr_us"]


def owid(places, length, seed=0, **columns):
    """A generated file with the columns of Our World in Data, and waves of cases in it."""
    rng, dates = np.random.default_rng(seed), pd.date_range("2020-01-05", periods=length).strftime("%Y-%m-%d")
    parts = []
    for i, place in enumerate(places):
        cases = rng.poisson(10.**rng.uniform(1, 4) * np.exp(np.sin(np.arange(length) / 40 + i))).astype(float)
        cases[rng.random(length) < .2] = np.nan
        parts.append(pd.DataFrame({"country": place, "date": dates, "new_cases": cases, "population": 1e6} | columns))
    return pd.concat(parts)


# the server

class Files(BaseHTTPRequestHandler):
    """Serves `server.body`; `server.cut` bytes an answer at most, and what else a test sets."""
    def log_message(self, *args): pass

    def do_GET(self):
        server = self.server
        server.asked.append(dict(self.headers))
        if server.status != 200:
            self.send_error(server.status)
            return
        if server.slow: time.sleep(server.slow)
        body, start, code = server.body, 0, 200
        wanted, version = self.headers.get("Range"), self.headers.get("If-Range")
        if wanted and server.ranges and version == server.etag:
            start = int(re.match(r"bytes=(\d+)-", wanted)[1])
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.end_headers()
                return
            code = 206
        self.send_response(code)
        if code == 206: self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if server.etag: self.send_header("ETag", server.etag)
        if server.length: self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        try: self.wfile.write(body[start:start + server.cut])
        except BrokenPipeError: pass  # who asked has given up
        self.close_connection = True


@pytest.fixture
def server():
    serving = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    serving.body, serving.cut, serving.etag, serving.ranges, serving.length, serving.status, serving.slow, serving.asked = os.urandom(400_000), 10**9, '"one"', True, True, 200, 0, []
    serving.url = f"http://127.0.0.1:{serving.server_port}/cases.csv"
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield serving
    serving.shutdown()
    serving.server_close()
    thread.join()


quietly = partial(download, progress=False, timeout=10, attempts=1)


def kept(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_download_is_whole_once_and_asked_for_once(server, tmp_path, capsys):
    path = download(server.url, tmp_path / "deep/er/cases.csv", sha256=hashlib.sha256(server.body).hexdigest())
    assert path.read_bytes() == server.body and kept(path.parent) == ["cases.csv"]
    assert hashlib.sha256(server.body).hexdigest() in capsys.readouterr().out
    assert quietly(server.url, path) == path and len(server.asked) == 1


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    server.cut = 150_000
    for part in (1, 2):
        with pytest.raises(DownloadError, match=f"{part * 150_000:,} bytes are kept"): quietly(server.url, tmp_path / "cases.csv")
        assert not (tmp_path / "cases.csv").exists() and (tmp_path / "cases.csv.part").stat().st_size == part * 150_000
    quietly(server.url, tmp_path / "cases.csv")
    assert (tmp_path / "cases.csv").read_bytes() == server.body and kept(tmp_path) == ["cases.csv"]
    assert [asked.get("Range") for asked in server.asked] == [None, "bytes=150000-", "bytes=300000-"]


def test_attempts_go_on_by_themselves(server, tmp_path):
    server.cut = 150_000
    assert download(server.url, tmp_path / "cases.csv", progress=False, attempts=3).read_bytes() == server.body


def test_a_version_that_changed_is_not_glued_to_the_old_one(server, tmp_path):
    server.cut = 150_000
    with pytest.raises(DownloadError): quietly(server.url, tmp_path / "cases.csv")
    server.body, server.etag, server.cut = os.urandom(300_000), '"two"', 10**9
    assert quietly(server.url, tmp_path / "cases.csv").read_bytes() == server.body


@pytest.mark.parametrize("etag, ranges", [('"one"', False), ("", True), ('W/"one"', True)], ids=["no ranges", "no version", "weak version"])
def test_a_server_that_cannot_resume_sends_the_whole_file_again(server, tmp_path, etag, ranges):
    server.etag, server.ranges, server.cut = etag, ranges, 150_000
    with pytest.raises(DownloadError, match="ended after 150,000 of 400,000"): quietly(server.url, tmp_path / "cases.csv")
    server.cut = 10**9
    assert quietly(server.url, tmp_path / "cases.csv").read_bytes() == server.body


def test_bytes_of_another_address_are_not_continued(server, tmp_path):
    server.cut = 150_000
    with pytest.raises(DownloadError): quietly(server.url, tmp_path / "cases.csv")
    server.cut = 10**9
    quietly(server.url + "?other", tmp_path / "cases.csv")
    assert "Range" not in server.asked[-1] and (tmp_path / "cases.csv").read_bytes() == server.body


def test_a_download_that_was_complete_but_not_named_is_named(server, tmp_path):
    server.cut = 150_000
    with pytest.raises(DownloadError): quietly(server.url, tmp_path / "cases.csv")
    server.cut = 10**9
    (tmp_path / "cases.csv.part").write_bytes(server.body)  # killed before the renaming
    assert quietly(server.url, tmp_path / "cases.csv").read_bytes() == server.body and len(server.asked) == 2
    (tmp_path / "cases.csv").rename(tmp_path / "cases.csv.part")
    (tmp_path / "cases.csv.part").write_bytes(server.body + b"too much")
    (tmp_path / "cases.csv.part.json").write_text('{"url": "%s", "version": "\\"one\\""}' % server.url)
    assert quietly(server.url, tmp_path / "cases.csv").read_bytes() == server.body


@pytest.mark.parametrize("note", ["", "{", "[]", '{"url": 3}'])
def test_a_broken_note_costs_a_new_start_and_no_more(server, tmp_path, note):
    (tmp_path / "cases.csv.part").write_bytes(b"something")
    (tmp_path / "cases.csv.part.json").write_text(note)
    assert quietly(server.url, tmp_path / "cases.csv").read_bytes() == server.body


def test_a_wrong_checksum_keeps_nothing_and_names_both(server, tmp_path):
    right = hashlib.sha256(server.body).hexdigest()
    with pytest.raises(DownloadError, match=f"{right}, and not {'0' * 64}"): quietly(server.url, tmp_path / "cases.csv", sha256="0" * 64)
    assert kept(tmp_path) == []
    quietly(server.url, tmp_path / "cases.csv", sha256=right.upper())
    with pytest.raises(DownloadError, match="SHA-256"): quietly(server.url, tmp_path / "cases.csv", sha256="0" * 64)  # of a file that is there
    assert (tmp_path / "cases.csv").exists()


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_the_answer_of_a_server_that_refuses_is_said(server, tmp_path, status):
    server.status = status
    with pytest.raises(DownloadError, match=f"the server answers {status}"): quietly(server.url, tmp_path / "cases.csv")
    assert kept(tmp_path) == []
    with pytest.raises(DownloadError): download(server.url, tmp_path / "cases.csv", progress=False, attempts=2)
    assert len(server.asked) == 1 + (2 if status >= 500 else 1)  # asking again helps only where the server is in trouble


def test_a_silent_server_and_no_network_are_told_apart(server, tmp_path):
    server.slow = 3
    start = time.monotonic()
    with pytest.raises(DownloadError, match="in time"): quietly(server.url, tmp_path / "cases.csv", timeout=.3)
    assert time.monotonic() - start < 2.5
    with pytest.raises(DownloadError, match=r"is there a network.\)\. A file"): quietly("http://nowhere.invalid/cases.csv", tmp_path / "cases.csv")
    server.server_close()
    with pytest.raises(DownloadError, match="refused"): quietly("http://127.0.0.1:1/cases.csv", tmp_path / "cases.csv")


def test_only_the_web_is_fetched(tmp_path):
    for url in ("ftp://example.org/a", "file:///etc/hostname", "cases.csv", ""):
        with pytest.raises(DownloadError, match="http"): quietly(url, tmp_path / "cases.csv")
    with pytest.raises(ValueError, match="timeout"): quietly("http://127.0.0.1:1/", tmp_path / "cases.csv", timeout=0)


def test_two_that_want_the_same_file_fetch_it_once(server, tmp_path):
    server.slow = .3
    threads = [threading.Thread(target=quietly, args=(server.url, tmp_path / "cases.csv")) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(server.asked) == 1 and (tmp_path / "cases.csv").read_bytes() == server.body


def test_an_address_is_read_like_a_file(server, tmp_path, monkeypatch):
    server.body = owid(["Malta", "Cyprus"], 40).to_csv(index=False).encode()
    with pytest.warns(UserWarning, match="lacks"): series = load_series(server.url, folder=tmp_path)
    assert series.names == ("Cyprus", "Malta")
    monkeypatch.setenv("TFORMER_DATA", str(tmp_path / "other"))
    path = local_file(server.url + "/../..%2f..%2fevil?x=/../y")
    assert path.parent == tmp_path / "other" and path.is_file()


# files

@pytest.mark.parametrize("content, says", [
    (b"", "is empty"), (b"\n\n", "is empty"), (b"country,date,new_cases\n", "not one row"), (b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", "bad.csv"), (b"<html><body>404</body></html>", "no column"),
    (b"Country,date,new_cases\nMalta,2020-01-01,3\n", "did it become 'Country'"), (b"country,date,cases\nMalta,2020-01-01,3\n", "no column 'new_cases'"), (b"country;date;new_cases\nMalta;2020-01-01;3\n", "no column"),
    (b"country,date,new_cases\nMalta,2020-13-01,3\n", "row 2: '2020-13-01' in column 'date' is no date"), (b"country,date,new_cases\nMalta,,3\n", "is no date"), (b"country,date,new_cases\nMalta,2020-01-01,3\nMalta,2020-01-02,three\n", "row 3: 'three' in column 'new_cases' is no number"),
    (b"country,date,new_cases\nMalta,2020-01-01,inf\n", "infinite"), (b"country,date,new_cases\nMalta,2020-01-01,3\nMalta,2020-01-01,4\n", "two rows for Malta on 2020-01-01"), (b'country,date,new_cases\n"Malta,2020', "cannot be read"),
    (b"country,date,new_cases\nMalta,2020-01-01,3,4,5\n", "line 2: it has 5 fields, and the head has 3"), (b"country,date,new_cases\n\nMalta,2020-01-01,3\nMalta,2020-01-02\n", "line 4: it has 2 fields, and the head has 3"),
    (b"country,date,new_cases\nMalta,2020-01-01T00:00+01:00,3\nMalta,2020-04-01T00:00+02:00,3\n", "more than one time zone"), (b"country,date,new_cases\nMalta,2020-01-01T00:00+01:00,3\nMalta,2020-01-02T00:00,3\n", "or some have none"), (b"country,date,new_cases\nMalta,2020-01-01,3\nMalta,2020-01-02,1,234\n", "line 3"), (b"country,date,new_cases\nMalta,2020-01-01,\n", "no value")])
def test_a_bad_file_is_refused_with_what_is_wrong(tmp_path, content, says):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(FileError, match=re.escape(says)), warnings.catch_warnings(action="ignore"): load_series(tmp_path / "bad.csv", names=["Malta"])


def test_a_truncated_archive_and_a_folder_and_nothing_are_refused(tmp_path):
    packed = gzip.compress(owid(["Malta"], 300).to_csv(index=False).encode())
    (tmp_path / "cut.csv.gz").write_bytes(packed[:len(packed) // 2])
    with pytest.raises(FileError, match="cannot be read"): load_series(tmp_path / "cut.csv.gz", names=["Malta"])
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(FileError, match="no file"): load_series(path)


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zip", "tar", "tar.gz", "zst"])
def test_what_is_no_archive_is_refused_in_one_line(tmp_path, ending):
    owid(["Malta"], 30).to_csv(tmp_path / f"a.csv.{ending}", index=False, compression=None)
    with pytest.raises(FileError, match=rf"^\S+{ending} cannot be read as a table: [^\n]+$"): load_series(tmp_path / f"a.csv.{ending}", names="Malta")


def test_quoted_fields_and_a_byte_order_mark_are_no_other_number_of_fields(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeff"note, if any",country,date,"new_cases"\r\n"a, b\r\nc","Malta",2020-01-01,"1,000"\r\n\r\n'.encode())
    assert read_table(tmp_path / "a.csv", COVID)["value"].tolist() == [1000]


def test_a_series_shorter_than_a_window_is_named_and_left_out(tmp_path):
    table = pd.concat([owid(["Malta"], 299), owid(["Cyprus", "Greece"], 300)])
    table.to_csv(tmp_path / "short.csv", index=False)
    with pytest.raises(FileError, match="a window and its horizon are 300 steps, and there are Malta .299.$"): epidemic_windows(tmp_path / "short.csv", names="Malta")
    with pytest.warns(UserWarning, match="are 300 steps, so that these series are left out: Malta .299.$"): windows, series = epidemic_windows(tmp_path / "short.csv", names=["Malta", "Greece", "Cyprus"])
    assert set(series.names) == {"Greece", "Cyprus"} and len(series.start) == 2
    for place, name in enumerate(series.names):
        with warnings.catch_warnings(action="ignore"): alone, _ = epidemic_windows(tmp_path / "short.csv", names=name)
        torch.testing.assert_close(windows.inputs[windows.group == place], alone.inputs)


def test_unknown_places_and_sources_are_named(tmp_path):
    owid(["Malta"], 30).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(FileError, match="none of the 1 places that are asked for .Atlantis"): load_series(tmp_path / "a.csv", names=["Atlantis"])
    with pytest.warns(UserWarning, match="lacks Atlantis"): assert load_series(tmp_path / "a.csv", names=["Atlantis", "Malta"]).names == ("Malta",)
    with pytest.raises(ValueError, match="did you mean 'rvr_us'"): load_series(tmp_path / "a.csv", "rvr_usa")


# preparation

def test_older_files_with_locations_and_other_orders_give_the_same_series(tmp_path):
    table = owid(["Malta", "Cyprus", "World"], 60)
    table.to_csv(tmp_path / "new.csv", index=False)
    table.sample(frac=1, random_state=0).rename(columns={"country": "location"})[["new_cases", "date", "location"]].to_csv(tmp_path / "old.csv.gz", index=False)
    with pytest.warns(UserWarning): new, old = load_series(tmp_path / "new.csv"), load_series(tmp_path / "old.csv.gz")
    assert new.names == old.names == ("Cyprus", "Malta") and new.start == ("2020-01-05",) * 2
    for a, b in zip(new.values, old.values): np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("source", SOURCES)
def test_no_value_holds_anything_of_later_days(source):
    values = np.random.default_rng(0).normal(size=80)
    values[[3, 20, 21, 50]] = np.nan
    for day in (5, 30, 79):
        other = values.copy()
        other[day:] = 1e6
        np.testing.assert_array_equal(prepare(values, SOURCES[source])[:day], prepare(other, SOURCES[source])[:day])


def test_missing_values_are_zero_for_cases_and_the_last_known_for_beds():
    x = np.array([np.nan, 2., np.nan, 4.])
    zero, last = np.array([0., 2, 0, 4]), np.array([2., 2, 2, 4])
    for source, filled in ((COVID, zero), (HOSPITAL, last)):
        np.testing.assert_allclose(prepare(x, source), [filled[max(0, i - source.smoothing + 1):i + 1].mean() for i in range(4)])


def test_days_that_are_missing_are_missing_values_and_weeks_stay_weeks(tmp_path):
    source = EpidemicSource("", ("country",), ("date",), ("new_cases",), "last", 1)
    def loaded(dates):
        pd.DataFrame({"country": "Malta", "date": dates, "new_cases": np.arange(1., len(dates) + 1)}).to_csv(tmp_path / "a.csv", index=False)
        return load_series(tmp_path / "a.csv", source).values[0].tolist()
    assert loaded(["2020-01-01", "2020-01-02", "2020-01-05", "2020-01-06"]) == [1, 2, 2, 2, 3, 4]
    assert loaded(["2020-01-01", "2020-01-08", "2020-01-22", "2020-01-29"]) == [1, 2, 2, 3, 4]
    with pytest.raises(FileError, match="Malta have no even step; 2020-01-10"): loaded(["2020-01-01", "2020-01-08", "2020-01-10", "2020-01-15", "2020-01-22"])


def test_sums_of_other_places_are_left_out_and_places_without_values_too(tmp_path):
    table = owid(["AL", "AK", "USA", "US", "Region 1", "region 10", "GU", "TX"], 30).rename(columns={"country": "jurisdiction", "date": "collection_date", "new_cases": "average_inpatient_beds_occupied"})
    table.loc[table.jurisdiction == "GU", "average_inpatient_beds_occupied"] = np.nan
    table.to_csv(tmp_path / "a.csv", index=False)
    with pytest.warns(UserWarning, match="GU has no value"): assert load_series(tmp_path / "a.csv", "rvr_us").names == ("AK", "AL", "TX")
    assert load_series(tmp_path / "a.csv", "rvr_us", names=["USA"]).names == ("USA",)  # asked for by name


def test_numbers_with_thousands_and_times_of_day_are_read(tmp_path):
    (tmp_path / "a.csv").write_text('jurisdiction,collection_date,average_inpatient_beds_occupied\nAL,2021-01-01T00:00:00.000,"12,345.5"\nAL,01/02/2021,7\n')
    table = read_table(tmp_path / "a.csv", HOSPITAL)
    assert table["value"].tolist() == [12345.5, 7] and table["date"].dt.day.tolist() == [1, 2]


def test_windows_of_generated_epidemics_leak_nothing(tmp_path):
    places = [*COUNTRIES[:6], "United States"]
    owid(places, 700).to_csv(tmp_path / "a.csv", index=False)
    windows, series = epidemic_windows(tmp_path / "a.csv", names=places)
    assert len(windows.inputs) == 7 * 3 and windows.inputs.shape[1:] == (240, 1) and windows.targets.shape[1:] == (60, 1)
    train, validation = split_windows(windows, np.random.default_rng(0), .3)
    assert not set(train.group.tolist()) & set(validation.group.tolist()) and len(set(validation.group.tolist())) == 2
    np.testing.assert_allclose(windows.inputs.mean(1), 0, atol=1e-4)
    last = windows.unscale(windows.targets)[2, -1, 0].item()
    assert last == pytest.approx(series.values[0][-1], rel=1e-4)
