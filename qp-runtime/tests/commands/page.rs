//! The server's page in a real browser: Chromium without a window, driven through chromedriver.
//!
//! Pictures of what was seen are left in the folder that the environment variable `QP_PICTURES` names.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::server::{Server, exchange_with};
use qp_codegen::skipped;
use serde_json::{Value, json};

/// A browser's session; dropping it ends the browser.
struct Browser {
    driver: Child,
    address: SocketAddr,
    session: String,
}

impl Browser {
    /// `None` if there is no browser or no driver for it.
    fn start() -> Option<Browser> {
        let binary = ["chromium", "google-chrome", "chrome"]
            .into_iter()
            .find(|b| Command::new(b).arg("--version").output().is_ok_and(|o| o.status.success()))?;
        let mut driver = Command::new("chromedriver").arg("--port=0").stdout(Stdio::piped()).spawn().ok()?;
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port: u16 = loop {
            let line = lines.next().expect("chromedriver says its port").unwrap();
            if let Some((_, rest)) = line.split_once("successfully on port ") {
                break rest.trim_end_matches('.').parse().unwrap();
            }
        };
        std::thread::spawn(move || lines.for_each(drop));
        let mut browser = Browser { driver, address: ([127, 0, 0, 1], port).into(), session: String::new() };
        let path = String::from_utf8(Command::new("which").arg(binary).output().unwrap().stdout).unwrap();
        let options = json!({"binary": path.trim(), "args":
            ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"]});
        let wanted = json!({"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}});
        let made = browser.call("POST", "/session", &json!({"capabilities": {"alwaysMatch": wanted}}));
        browser.session = format!("/session/{}", made["sessionId"].as_str().unwrap());
        Some(browser)
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if method == "GET" { String::new() } else { body.to_string() };
        let response = exchange_with(self.address, method, path, &body).unwrap();
        assert_eq!(response.status, 200, "{path}: {}", response.text());
        response.json()["value"].clone()
    }

    fn command(&self, method: &str, path: &str, body: Value) -> Value {
        self.call(method, &format!("{}{path}", self.session), &body)
    }

    fn run(&self, script: &str) -> Value {
        self.command("POST", "/execute/sync", json!({"script": script, "args": []}))
    }

    /// Waits until an expression is true.
    fn wait(&self, expression: &str) {
        let until = Instant::now() + Duration::from_secs(120);
        while self.run(&format!("return !!({expression})")) != Value::Bool(true) {
            assert!(Instant::now() < until, "never true: {expression}\n{}", self.run("return document.body.innerText"));
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Types into the element that has the focus.
    fn keys(&self, text: &str) {
        let element = self.command("GET", "/element/active", Value::Null);
        let id = element.as_object().unwrap().values().next().unwrap().as_str().unwrap().to_owned();
        self.command("POST", &format!("/element/{id}/value"), json!({"text": text}));
    }

    fn size(&self, width: u32, height: u32) {
        self.command("POST", "/window/rect", json!({"width": width, "height": height}));
    }

    fn picture(&self, name: &str) {
        let Ok(folder) = std::env::var("QP_PICTURES") else { return };
        let text = self.command("GET", "/screenshot", Value::Null);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(format!("{folder}/{name}.png"), base64(text.as_str().unwrap())).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            let _ = exchange_with(self.address, "DELETE", &self.session, "");
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

fn base64(text: &str) -> Vec<u8> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<u8> = text.bytes().filter(|c| !matches!(c, b'=' | b'\n')).map(value).collect();
    let group = |d: &[u8]| {
        let bits = d.iter().enumerate().fold(0u32, |all, (i, &v)| all | u32::from(v) << (18 - 6 * i));
        bits.to_be_bytes()[1..d.len()].to_vec()
    };
    digits.chunks(4).flat_map(group).collect()
}

const ENTER: &str = "\u{e007}";
const ESCAPE: &str = "\u{e00c}";

#[test]
fn a_conversation_in_a_browser() {
    let Some(browser) = Browser::start() else {
        skipped::note("there is no chromium with chromedriver");
        return;
    };
    let server = Server::start(&["--name", "kjv", "--context", "1024"]);
    browser.command("POST", "/url", json!({"url": format!("http://{}/", server.address)}));
    browser.wait("document.getElementById('name').textContent === 'kjv'");
    browser.wait("document.querySelector('#dot.ok')");

    // Type, stream.
    browser.run("document.getElementById('max_tokens').value = 12; document.getElementById('max_tokens').dispatchEvent(new Event('input'));");
    browser.run("document.getElementById('temperature').value = 0; document.getElementById('temperature').dispatchEvent(new Event('input'));");
    browser.run("document.getElementById('input').focus()");
    browser.keys(&format!("And it came to pass in those days, that{ENTER}"));
    browser.wait("document.querySelector('.message.assistant .foot button')");
    let text = browser.run("return document.querySelector('.message.assistant .text').textContent");
    let asked = json!({"messages": [{"role": "user", "content": "And it came to pass in those days, that"}], "max_tokens": 12, "temperature": 0});
    let expected = server.post("/v1/chat/completions", &asked).json()["choices"][0]["message"]["content"].clone();
    assert_eq!(text.as_str().unwrap().trim(), expected.as_str().unwrap().trim());
    let foot = browser.run("return document.querySelector('.message.assistant .foot').textContent");
    assert!(foot.as_str().unwrap().contains("12 tokens") && foot.as_str().unwrap().contains("tokens/s"), "{foot}");
    assert_eq!(browser.run("return document.getElementById('input').value"), "");

    // A long answer, stopped by the keyboard.
    browser.run("document.getElementById('max_tokens').value = 900; document.getElementById('max_tokens').dispatchEvent(new Event('input'));");
    browser.keys(&format!("And God said <b>unto</b> Noah,{ENTER}"));
    browser.wait("document.querySelectorAll('.message.assistant')[1]?.querySelector('.text').textContent.length > 20");
    assert_eq!(browser.run("return document.getElementById('stop').hidden"), false);
    browser.keys(ESCAPE);
    browser.wait(
        "document.querySelectorAll('.message.assistant')[1].querySelector('.foot')?.textContent.includes('stopped')",
    );
    server.assert_idle();
    assert_eq!(browser.run("return document.getElementById('stop').hidden"), true);
    // What looks like HTML is text.
    assert_eq!(
        browser.run("return document.querySelectorAll('.message.user')[1].textContent"),
        "And God said <b>unto</b> Noah,"
    );

    // Everything is there again after loading the page anew.
    let before = browser.run("return document.getElementById('talk').innerText");
    browser.command("POST", "/refresh", json!({}));
    browser.wait("document.getElementById('name').textContent === 'kjv'");
    assert_eq!(browser.run("return document.getElementById('talk').innerText"), before);

    // The model: a cell a layer, and memory by kind.
    browser.run("document.getElementById('toggle').click()");
    browser.wait("document.querySelectorAll('#plan rect[data-layer]').length === 43");
    assert!(
        browser.run("return document.getElementById('memory').innerText").as_str().unwrap().contains("keys and values")
    );
    browser.wait("document.querySelectorAll('#live tr').length === 5");
    // A key is asked for only where one is needed.
    assert_eq!(browser.run("return document.getElementById('keyrow').offsetHeight"), 0);
    browser.picture("light");
    browser.run("document.getElementById('theme').click()");
    assert_eq!(browser.run("return document.documentElement.dataset.theme"), "dark");
    browser.picture("dark");

    // A narrow window has no need to scroll sideways.
    browser.size(500, 800);
    browser.run("document.getElementById('close').click()");
    browser.wait("document.documentElement.scrollWidth <= innerWidth && innerWidth <= 500");
    // Its buttons stay on one line, and each lies within the window.
    browser.wait("[...document.querySelectorAll('header button')].every(b => b.offsetHeight < 50 && b.getBoundingClientRect().right <= innerWidth)");
    browser.picture("narrow");

    // A new conversation; and an error is shown where the answer would be.
    browser.run("document.getElementById('new').click()");
    assert_eq!(browser.run("return document.querySelectorAll('.message').length"), 0);
    browser.run("document.getElementById('max_tokens').value = 5000; document.getElementById('max_tokens').dispatchEvent(new Event('input'));");
    browser.keys(&format!("x{ENTER}"));
    browser.wait("document.querySelector('.error')?.textContent.includes('context')");

    let log = browser.command("POST", "/se/log", json!({"type": "browser"}));
    let severe: Vec<&Value> = log.as_array().unwrap().iter().filter(|e| e["level"] == "SEVERE").collect();
    // The request that was refused is logged by the browser itself.
    assert!(severe.iter().all(|e| e["message"].as_str().unwrap().contains("400")), "{severe:?}");
}
