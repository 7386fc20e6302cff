"""The report's page in a browser: it sorts, links, can be read, and loads nothing."""

import itertools
import shutil

import pytest
import report_content as made

from fidelity_jax import report

webdriver = pytest.importorskip(
  "selenium.webdriver", reason="selenium is not installed"
)
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

_FLAGS = (
  *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
  *("--no-first-run", "--disable-background-networking"),
  *("--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
  """The address of the page of a report with everything in it."""
  rows = made.classified(seeds=(0, 1)) + made.restored()
  stages = made.stages(rows)
  content = made.content(
    rows,
    sections=("tables", "claims"),
    missing=["estimator-deadbeef: failed: no room on the disk"],
    stages=stages,
    activations=[made.activations(64)],
    examples=[made.examples(size=16)],
  )
  place = tmp_path_factory.mktemp("page")
  report.write(place, content)
  return (place / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  """A browser without a window."""
  programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
  for name, path in programs.items():
    if path is None:
      pytest.skip(f"{name} is not installed (Debian: chromium, chromium-driver)")
  options = webdriver.ChromeOptions()
  options.binary_location = programs["chromium"]
  for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
    options.add_argument(flag)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
  service = webdriver.ChromeService(programs["chromedriver"])
  driver = webdriver.Chrome(options=options, service=service)
  try:
    yield driver
  finally:
    driver.quit()


@pytest.fixture
def page(browser, address):
  """Opens the page, of a size and in a scheme."""

  def show(width=1600, scheme="light"):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    # Away first: to another anchor of the same page nothing would be loaded.
    browser.get("about:blank")
    browser.get(address)
    return browser

  return show


def _table(page, section):
  return page.find_element(By.CSS_SELECTOR, f"#{section} table.sortable")


def _texts(page, section, column):
  """Returns a column's texts, without the small print."""
  script = """
    return [...arguments[0].tBodies[0].rows].map(row => {
      const cell = row.cells[arguments[1]].cloneNode(true);
      for (const small of cell.querySelectorAll("small")) small.remove();
      return cell.textContent.trim();
    })"""
  return page.execute_script(script, _table(page, section), column)


def _buttons(page, section):
  return _table(page, section).find_elements(By.CSS_SELECTOR, "thead button")


def _number(shown):
  return float(shown.replace("−", "-"))


def test_it_opens_without_errors_and_without_the_network(browser, address, page):
  browser.get_log("browser"), browser.get_log("performance")
  show = page()
  for summary in show.find_elements(By.CSS_SELECTOR, "summary"):
    show.execute_script("arguments[0].click()", summary)
  assert show.get_log("browser") == []
  requested = [
    entry["message"].split('"url":"')[1].split('"')[0]
    for entry in show.get_log("performance")
    if "Network.requestWillBeSent" in entry["message"]
  ]
  others = {url for url in requested if not url.startswith("data:")}
  assert others <= {address, "about:blank"} and address in others
  loaded = show.execute_script(
    "return performance.getEntriesByType('resource').map(entry => entry.name)"
  )
  assert [name for name in loaded if not name.startswith("data:")] == []


def test_numbers_sort_as_numbers(page):
  show = page()
  before = _texts(show, "accuracy", 6)
  assert sorted(before, key=_number) != before
  # As texts they would stand otherwise: "9.10" after "80.10".
  assert sorted(before) != sorted(before, key=_number)
  button = _buttons(show, "accuracy")[6]
  heading = button.find_element(By.XPATH, "..")
  assert heading.get_attribute("aria-sort") == "none"
  button.click()
  assert _texts(show, "accuracy", 6) == sorted(before, key=_number)
  assert heading.get_attribute("aria-sort") == "ascending"
  button.click()
  assert _texts(show, "accuracy", 6) == sorted(before, key=_number, reverse=True)
  assert heading.get_attribute("aria-sort") == "descending"
  _buttons(show, "accuracy")[1].click()
  assert heading.get_attribute("aria-sort") == "none"


def test_whole_rows_move(page):
  show = page()
  columns = range(9)
  rows = lambda: set(zip(*(_texts(show, "accuracy", c) for c in columns), strict=True))
  before = rows()
  _buttons(show, "accuracy")[0].click()
  assert rows() == before and len(before) == 12


def test_texts_sort_and_equal_ones_stay_in_order(page):
  show = page()
  names = _texts(show, "stages", 0)
  kinds = _texts(show, "stages", 1)
  pairs = list(zip(kinds, names, strict=True))
  _buttons(show, "stages")[1].click()
  expected = sorted(pairs, key=lambda pair: pair[0])
  assert _texts(show, "stages", 0) == [name for _, name in expected]
  _buttons(show, "stages")[1].click()
  groups = itertools.groupby(expected, key=lambda pair: pair[0])
  falling = [[name for _, name in group] for _, group in groups][::-1]
  assert _texts(show, "stages", 0) == list(itertools.chain(*falling))


def test_nothing_stands_last_either_way(page):
  show = page()
  button = _buttons(show, "claims")[3]
  for _ in range(2):
    button.click()
    shown = _texts(show, "claims", 3)
    assert shown[-1] == "–" and "–" not in shown[:-1]


@pytest.mark.parametrize("key", [Keys.ENTER, Keys.SPACE])
def test_the_keyboard_sorts(page, key):
  show = page()
  before = _texts(show, "accuracy", 3)
  button = _buttons(show, "accuracy")[3]
  # From the heading before, as with the Tab key.
  show.execute_script("arguments[0].focus()", _buttons(show, "accuracy")[2])
  show.switch_to.active_element.send_keys(Keys.TAB)
  assert show.switch_to.active_element == button
  button.send_keys(key)
  assert _texts(show, "accuracy", 3) == sorted(before, key=_number)


@pytest.mark.parametrize("width", [400, 1600])
def test_it_fits(page, width):
  show = page(width)
  for details in show.find_elements(By.TAG_NAME, "details"):
    show.execute_script("arguments[0].open = true", details)
  size = show.execute_script(
    "return [document.documentElement.scrollWidth, document.body.scrollWidth]"
  )
  assert max(size) <= width
  small = show.execute_script(
    """return [...document.querySelectorAll("p, td, th, small, li, dd, figcaption")]
      .filter(e => e.textContent.trim())
      .filter(e => parseFloat(getComputedStyle(e).fontSize) < 10).length"""
  )
  assert small == 0


def test_the_first_column_stays_when_a_table_scrolls(page):
  show = page(400)
  box = show.find_element(By.CSS_SELECTOR, "#accuracy .scroll")
  cell = show.find_element(By.CSS_SELECTOR, "#accuracy tbody th")
  place = lambda: show.execute_script(
    "return arguments[0].getBoundingClientRect().left", cell
  )
  before = place()
  scrolled = show.execute_script(
    "arguments[0].scrollLeft = 300; return arguments[0].scrollLeft", box
  )
  assert scrolled == 300 and place() == before


# The contrast of each text with what is behind it (WCAG 2, "relative luminance").
_CONTRASTS = """
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(
    v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
  ).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll("body, body *")].filter(e =>
    [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) &&
    !["SCRIPT", "STYLE", "TITLE"].includes(e.tagName.toUpperCase()));
  return texts.filter(e => !e.closest("#examples svg")).map(e => {
    const style = getComputedStyle(e);
    const ink = e.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(parse(ink)), light(behind(e))];
    return [e.tagName + ": " + e.textContent.trim().slice(0, 40),
            (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
"""


def test_light_and_dark_can_both_be_read(page):
  looks = {}
  for scheme in ("light", "dark"):
    show = page(scheme=scheme)
    contrasts = show.execute_script(_CONTRASTS)
    assert len(contrasts) > 500
    weak = [(name, value) for name, value in contrasts if value < 4.5]
    assert weak == []
    assert any(name.startswith("text: ") for name, _ in contrasts)
    style = (
      "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    )
    looks[scheme] = show.execute_script(style)
  (light_paper, light_ink), (dark_paper, dark_ink) = looks["light"], looks["dark"]
  assert light_paper != dark_paper and light_ink != dark_ink


def test_rows_lead_to_their_stages(page):
  show = page()
  links = _table(show, "accuracy").find_elements(By.CSS_SELECTOR, "tbody a")
  assert len(links) >= 12
  targets = {link.get_attribute("hash") for link in links}
  for target in targets:
    entry = show.find_element(By.ID, target[1:])
    assert entry.tag_name == "article"
    assert entry.find_elements(By.CSS_SELECTOR, "details pre")
    assert entry.find_elements(By.CSS_SELECTOR, "details svg")
  last = links[-1]
  name = last.get_attribute("title")
  show.execute_script("arguments[0].scrollIntoView({block: 'center'})", last)
  last.click()
  entry = show.find_element(By.CSS_SELECTOR, "article:target")
  assert entry.find_element(By.TAG_NAME, "h3").text == name
  place = show.execute_script("return arguments[0].getBoundingClientRect().top", entry)
  assert 0 <= place < 1000


def test_figures_have_their_ids_and_titles_for_themselves(page):
  show = page()
  ids = show.execute_script(
    "return [...document.querySelectorAll('[id]')].map(element => element.id)"
  )
  assert len(ids) == len(set(ids))
  unnamed = show.execute_script(
    """return [...document.querySelectorAll("figure svg")].filter(svg =>
      !document.getElementById(svg.getAttribute("aria-labelledby"))?.textContent)
      .length"""
  )
  assert unnamed == 0
  levels = show.execute_script(
    """return [...document.querySelectorAll("h1, h2, h3")].map(h => +h.tagName[1])"""
  )
  assert levels[0] == 1 and levels.count(1) == 1


def test_it_fits_on_paper(page):
  show = page(1000)
  show.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
  try:
    # Nothing scrolls on paper.
    assert show.execute_script("return document.documentElement.scrollWidth") <= 1000
  finally:
    show.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
