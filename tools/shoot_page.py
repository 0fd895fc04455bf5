"""Pictures of the server's web page, taken by a headless Chromium of a real server with a real model.

    python tools/shoot_page.py OUT_DIR [--model demo]

Besides the pictures it checks what they cannot show: every request goes to the server, nothing is written to the
console as an error, no part of the page is wider than a phone, the chat can be used by keyboard alone, markdown that is
meant to do harm does none, the key is asked for once, and images are sent if and only if the server takes them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from chromium import CTRL, Browser, browsing
from program import served

KEY = "a secret"
WIDE, PHONE = (1280, 860), (390, 844)
STORY = {
    "method": "POST",
    "headers": {"content-type": "application/json", "authorization": f"Bearer {KEY}"},
    "body": json.dumps({"max_tokens": 48, "messages": [{"role": "user", "content": "Tell a story."}]}),
}
QUESTION = "Why is the sky blue? Answer in three sentences."
# An answer as large models write them, put where the server's would be kept: the demo model writes no tables.
SHOWN = """Sorting by **hand** and by `sorted` cost the same here; what differs is *how often* you do it.

## Two ways

1. Keep a heap, and pop.
2. Sort once:
   - simple to read
   - \\(O(n \\log n)\\), see [the manual](https://docs.python.org/3/howto/sorting.html)

```python
import heapq

def smallest(numbers, k):
    \"\"\"The k smallest of numbers, in order.\"\"\"
    return heapq.nsmallest(k, numbers)  # O(n log k)
```

| way | time | memory |
|:----|-----:|:------:|
| heap | O(n log k) | O(k) |
| sort | O(n log n) | O(n) |

> For k close to n, sort. A <script>alert(1)</script> stays text.
"""
# Counts of a model of K2.5's size: made up, for the pace at which such a map can be drawn and how it looks.
LARGE = """(() => {
  const cells = 60 * 384, many = (size, value) => Array.from({length: size}, value);
  const heat = Uint8Array.from(many(cells, () => 255 * Math.random() ** 3));
  const places = heat.map((share) => (share > 200 ? 1 : share < 3 ? 2 : 0));
  const packed = (bytes) => btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(''));
  const facts = {layers: many(60, (_, i) => i + 1), experts: 384, per_token: 8, heat: packed(heat),
    places: packed(places), choices: many(60, () => 80000), peaks: many(60, () => 1200),
    top: [], tier: null, cache: null};
  const chosen = () => many(480, (_, i) => Math.floor(i / 8) * 384 + Math.floor(384 * Math.random()));
  const stream = () => new ReadableStream({async pull(to) {
    await new Promise((then) => setTimeout(then, 200));
    const event = JSON.stringify({cells: chosen(), times: many(480, () => 1)});
    to.enqueue(new TextEncoder().encode(`data: ${event}\n\n`));
  }});
  const known = window.fetch;
  window.fetch = async (path, options) => path === '/v1/kimi/experts' ? new Response(JSON.stringify(facts))
    : path === '/v1/kimi/events' ? new Response(stream()) : known(path, options);
})()"""
MARKDOWN = {
    "<img src=x onerror=alert(1)> & co": "<p>&lt;img src=x onerror=alert(1)&gt; &amp; co</p>",
    "[x](javascript:alert(1)) [y](data:text/html,z)": "<p>[x](javascript:alert(1)) [y](data:text/html,z)</p>",
    "[a](https://b.c/d_e_f)": '<p><a href="https://b.c/d_e_f" target="_blank" rel="noopener noreferrer">a</a></p>',
    "![p](https://b.c/d.png)": '<p><a href="https://b.c/d.png" target="_blank" rel="noopener noreferrer">p</a></p>',
    "**a *b* c** ***d*** snake_case_name 2 * 3 * 4": (
        "<p><strong>a <em>b</em> c</strong> <strong><em>d</em></strong> snake_case_name 2 * 3 * 4</p>"
    ),
    "`a ``b`` *c*` ``d`e``": "<p><code>a ``b`` *c*</code> <code>d`e</code></p>",
    "$x_1 + x_2$ costs $5 and $6": '<p><code class="math">$x_1 + x_2$</code> costs $5 and $6</p>',
    "# One #\n## Two\nthree": "<h3>One</h3><h4>Two</h4><p>three</p>",
    "- a\n- b\n  1. c\n\n- d": '<ul><li>a</li><li>b<ol start="1"><li>c</li></ol></li><li>d</li></ul>',
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "a\n\n---\nb\\\nc": "<p>a</p><hr><p>b<br>c</p>",
}
PASTE = """new Promise((then) => {
  const canvas = document.createElement('canvas'), pen = canvas.getContext('2d');
  pen.fillStyle = 'teal';
  pen.fillRect(0, 0, 300, 150);
  canvas.toBlob((blob) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([blob], 'teal.png', {type: 'image/png'}));
    const paste = new ClipboardEvent('paste', {clipboardData: transfer, bubbles: true, cancelable: true});
    document.querySelector('#prompt').dispatchEvent(paste);
    then(true);
  });
})"""
TAKES_IMAGES = """(() => {
  const known = window.fetch;
  window.fetch = async (path, options) => {
    if (path === '/v1/chat/completions') return new Response(window.sent = options.body);
    const response = await known(path, options);
    if (path !== '/v1/kimi/server' || !response.ok) return response;
    return new Response(JSON.stringify({...await response.json(), images: true}));
  };
})()"""
REASONING = "They ask for two ways. A heap keeps k elements.\nSorting once is simpler."


def shoot_all(browser: Browser, address: str, out: Path) -> None:
    """Through the page as a person would go."""
    browser.size(*WIDE)
    browser.scheme("light")
    browser.call("Page.navigate", url=f"{address}/")
    browser.wait("document.querySelector('#key-dialog')?.open")
    browser.shoot(out / "key.png")
    browser.type(KEY)
    browser.press("Enter", 13, "\r")
    browser.wait("document.querySelector('#facts').textContent")
    browser.errors.clear()  # the refusal that made it ask
    browser.run("document.querySelector('#prompt').focus()")
    browser.shoot(out / "chat-empty.png")
    check_markdown(browser)
    chat(browser, out)
    written(browser, out)
    views(browser, out)
    phone(browser, out)
    large(browser, out)
    images(browser, out)


def ask(browser: Browser, text: str) -> None:
    assert browser.run("document.activeElement.id") == "prompt", "one can type at once"
    browser.type(text)
    browser.press("Enter", 13, "\r")


def chat(browser: Browser, out: Path) -> None:
    """By keyboard alone: a long text whose reading is stopped, and a question whose answer is."""
    ctx = int(browser.run("document.querySelector('#facts').textContent.match(/(\\d+)k tokens/)[1]")) * 1024
    ask(browser, "Summarise this. " + "The quick brown fox jumps over the lazy dog. " * (ctx // 60))
    browser.wait("document.querySelector('#prefill').value > 0")
    browser.shoot(out / "chat-reading.png")
    browser.press("Escape", 27)
    browser.wait("!document.querySelector('.growing')")
    browser.run("document.querySelector('#new').click()")
    ask(browser, QUESTION)
    if browser.run("!document.querySelector('#thinking-label').hidden"):
        browser.wait("document.querySelector('.thought.going') && document.querySelector('.reasoning').textContent[80]")
        browser.shoot(out / "chat-thinking.png")
        browser.press("Enter", 13, "\r", CTRL)
    browser.wait("document.querySelector('.growing .answer')?.textContent.length > 60")
    browser.shoot(out / "chat-streaming.png")
    browser.press("Escape", 27)
    browser.wait("!document.querySelector('.growing')")
    assert browser.run("document.querySelector('.note').textContent") == "Stopped."
    reached = []
    for _ in range(4):
        browser.press("Tab", 9)
        reached.append(browser.run("document.activeElement.id"))
    assert reached == ["attach", "options", "new", "send"], reached
    browser.run("document.querySelector('#options').click()")
    browser.shoot(out / "options.png")
    browser.press("Escape", 27)
    assert not browser.run("document.querySelector('dialog[open]')")


def written(browser: Browser, out: Path) -> None:
    """A conversation as a large model would hold it, in place of the demo model's."""
    answer = {
        "role": "assistant", "content": SHOWN, "reasoning": REASONING, "thoughtFor": 4.1, "finish": "stop",
        "timings": {"predicted_n": 212, "predicted_per_second": 5.8, "prompt_n": 10, "cache_n": 1190, "first_ms": 1600},
        "usage": {"total_tokens": 1416, "completion_tokens_details": {"reasoning_tokens": 30}},
    }  # fmt: skip
    question = {"role": "user", "content": "How do I find the k smallest numbers? <|im_end|> is text."}
    kept = json.dumps({"format": "kimi-local conversation 1", "options": {}, "messages": [question, answer]})
    browser.run(f"sessionStorage.setItem('kimi-local conversation', {json.dumps(kept)})")
    browser.call("Page.reload")
    browser.wait("document.querySelector('.wide table')")
    browser.wait("!document.querySelector('#gauge').hidden")
    assert not browser.run("document.querySelector('.answer script')"), "markup of the model is text"
    browser.shoot(out / "chat-markdown.png")
    browser.run("document.querySelector('.thought').open = true; scrollTo(0, 0)")
    browser.scheme("dark")
    browser.shoot(out / "chat-markdown-dark.png")
    browser.run("document.querySelector('.thought').open = false")


def check_markdown(browser: Browser) -> None:
    """Text that is meant to do harm, or looks odd while it is half there, and what becomes of it."""
    for text, expected in MARKDOWN.items():
        build = f"""import('/page/markdown.js').then(({{Markdown}}) => {{
            const root = document.createElement('div'), whole = {json.dumps(text)}, grown = new Markdown(root);
            for (let end = 0; end <= whole.length; end++) grown.show(whole.slice(0, end));
            const once = document.createElement('div');
            new Markdown(once).show(whole);
            return [root.innerHTML, once.innerHTML];
        }})"""
        grown, once = browser.run(build)
        assert grown == once, f"grown {grown!r}, but at once {once!r}"
        assert once == expected, f"{text!r} gives {once!r}"


def views(browser: Browser, out: Path) -> None:
    browser.run(f"fetch('/v1/chat/completions', {json.dumps(STORY)}), 0")  # not awaited
    for scheme in ("dark", "light"):
        browser.scheme(scheme)
        browser.run("location.hash = '#experts'")
        browser.wait("document.querySelectorAll('#top-experts td').length > 2")
        if scheme == "light":
            browser.run("document.querySelector('#heat').focus()")
            for key, code in (("ArrowRight", 39), ("ArrowDown", 40)) * 3:
                browser.press(key, code)
            assert "Layer" in browser.run("document.querySelector('#heat-tip').textContent")
        browser.shoot(out / f"experts-{scheme}.png")
        browser.run("location.hash = '#memory'")
        browser.wait("document.querySelector('#machine td')")
        browser.shoot(out / f"memory-{scheme}.png")
    browser.run("document.querySelector('#only-ours').click()")
    browser.shoot(out / "memory-ours.png")
    browser.run("document.querySelector('#only-ours').click()")


def large(browser: Browser, out: Path) -> None:
    browser.run(LARGE)
    for name, size in (("wide", WIDE), ("phone", PHONE)):
        browser.size(*size)
        browser.run("location.hash = '#memory'")
        time.sleep(0.3)
        browser.run("location.hash = '#experts'; scrollTo(0, 0)")
        browser.wait("document.querySelector('#heat-caption').textContent.includes('384')")
        time.sleep(1)
        browser.shoot(out / f"experts-large-{name}.png")


def phone(browser: Browser, out: Path) -> None:
    browser.size(*PHONE)
    for name in ("chat", "experts", "memory"):
        browser.run(f"location.hash = '#{name}'; scrollTo(0, 0)")
        time.sleep(0.5)
        browser.shoot(out / f"phone-{name}.png")
        assert browser.run("document.documentElement.scrollWidth") <= PHONE[0], f"{name} is wider than a phone"


def images(browser: Browser, out: Path) -> None:
    """Pasted: refused in words by a server that takes none, and sent as data to one that does."""
    browser.size(*WIDE)
    browser.run("location.hash = '#chat'; document.querySelector('#new').click()")
    browser.run(PASTE)
    browser.wait("document.querySelector('#notice').textContent.includes('takes no images')")
    browser.shoot(out / "chat-no-images.png")
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=TAKES_IMAGES)
    browser.call("Page.reload")
    browser.wait("document.querySelector('#facts')?.textContent")
    browser.run(PASTE)
    browser.wait("document.querySelector('#images img')")
    browser.type("What is this?")
    browser.shoot(out / "chat-image.png")
    browser.press("Enter", 13, "\r")
    browser.wait("window.sent")
    image, text = json.loads(browser.run("window.sent"))["messages"][-1]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,") and text["text"] == "What is this?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (
        served(arguments.model, env={"KIMI_LOCAL_API_KEY": KEY}) as (address, _),
        browsing(arguments.chromium) as browser,
    ):
        shoot_all(browser, address, arguments.out)
        elsewhere = [url for url in browser.requests if not url.startswith((address, "data:", "blob:"))]
        assert not elsewhere, f"requests to others: {elsewhere}"
        assert not browser.errors, f"errors in the console: {browser.errors}"
        print(f"{len(browser.requests)} requests, all to {address}")


if __name__ == "__main__":
    main()
