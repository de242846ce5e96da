"""The MLflow UI in a real headless browser shows the run tree, metrics and figures of a finished run."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from tests.pipeline.tiny import FinishedRun, clean_environment, mlflow_runs

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# Without these, Chromium asks the network for things that no test needs.
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")

if os.environ.get("LAZYPIPE_REQUIRE_BROWSER") and not (BROWSER and DRIVER):
    raise RuntimeError("LAZYPIPE_REQUIRE_BROWSER is set, but chromium or chromedriver is not installed")
needs_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def ui(finished_run: FinishedRun) -> Iterator[str]:
    """`lazypipe ui` on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lazypipe", "ui", "--root", str(finished_run.root), "--port", str(port)]
    process = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None, "the UI ended by itself"
                assert time.monotonic() < deadline, "the UI did not come up"
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1500,1000", *QUIET):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER or ""))
    try:
        yield driver
    finally:
        driver.quit()


def text_of(browser: WebDriver) -> str:
    return browser.find_element(By.TAG_NAME, "body").text


def wait_for(browser: WebDriver, *texts: str, seconds: float = 90) -> None:
    try:
        WebDriverWait(browser, seconds).until(lambda b: all(t in text_of(b) for t in texts))
    except TimeoutException:
        raise AssertionError(f"{texts} are not all on the page:\n{text_of(browser)[:2000]}") from None


@needs_browser
def test_the_ui_shows_the_tree_the_metrics_and_the_figures(
    ui: str, browser: WebDriver, finished_run: FinishedRun, tmp_path: Path
) -> None:
    runs = {r.info.run_name: r.info for r in mlflow_runs(finished_run.root)}
    experiment = runs["tiny"].experiment_id
    # Screenshots go where a person can look at them.
    shots = Path(os.environ.get("LAZYPIPE_SCREENSHOTS", tmp_path))

    browser.get(f"{ui}/#/experiments/{experiment}/runs")
    wait_for(browser, "Run Name", "tiny")
    for close in browser.find_elements(By.CSS_SELECTOR, "[data-component-id='mlflow.assistant.chat_panel.close']"):
        close.click()
    expander = WebDriverWait(browser, 90).until(
        lambda b: b.find_elements(By.CSS_SELECTOR, "button[data-component-id*='runnamecellrenderer']")
    )
    expander[0].click()
    wait_for(browser, "pretrain/lazy", "evaluate/standard", "sparsity/lazy", "tokenize", "report")
    browser.save_screenshot(str(shots / "runs.png"))

    lazy = f"{ui}/#/experiments/{experiment}/runs/{runs['pretrain/lazy'].run_id}"
    browser.get(lazy)
    wait_for(browser, "loss", "grad_norm", "tokens_per_s", "model.max_bias_length")
    browser.get(f"{lazy}/model-metrics")
    wait_for(browser, "layer_0", "pretrain/lazy (sparsity/layer_0)")  # charts further down are drawn when scrolled to
    browser.save_screenshot(str(shots / "metrics.png"))

    figure = f"{ui}/#/experiments/{experiment}/runs/{runs['sparsity/lazy'].run_id}/artifacts/figures/tau_heat_map.png"
    browser.get(figure)
    width = "return Math.max(0, ...[...document.querySelectorAll('img')].map(i => i.naturalWidth))"
    WebDriverWait(browser, 90).until(lambda b: b.execute_script(width) > 300)
    wait_for(browser, "tau_heat_map.png")
    browser.save_screenshot(str(shots / "figure.png"))
