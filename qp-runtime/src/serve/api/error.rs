//! Errors in OpenAI's form.

use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::serve::answer::Broken;

/// Characters of a message's beginning, and of its end, that are shown.
const SHOWN: usize = 500;

/// An error that is told to a client.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// HTTP's status.
    pub status: StatusCode,
    /// What is wrong and what to do, for people.
    pub message: String,
    /// The parameter of the request that is wrong.
    pub param: Option<String>,
    /// A word for programs, such as `context_length_exceeded`.
    pub code: Option<&'static str>,
    /// Seconds after which to try again.
    pub retry: Option<u64>,
}

impl ApiError {
    /// An error with a status and a message.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        ApiError { status, message: message.into(), param: None, code: None, retry: None }
    }

    /// A request that is wrong, by a parameter's fault.
    pub fn parameter(param: &str, message: impl Into<String>) -> Self {
        ApiError { param: Some(param.to_owned()), ..ApiError::new(StatusCode::BAD_REQUEST, message) }
    }

    /// The same with a word for programs.
    pub fn with_code(self, code: &'static str) -> Self {
        ApiError { code: Some(code), ..self }
    }

    /// The same with a time after which to try again, in seconds.
    pub fn after(self, seconds: u64) -> Self {
        ApiError { retry: Some(seconds), ..self }
    }

    /// The body.
    pub fn json(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        };
        let (message, param) = (shortened(&self.message), self.param.as_deref().map(shortened));
        json!({"error": {"message": message, "type": kind, "param": param, "code": self.code}})
    }
}

/// `text` without its middle, if it is long: what a client sent is repeated in part only.
fn shortened(text: &str) -> String {
    let begin = text.char_indices().nth(SHOWN).map_or(text.len(), |(at, _)| at);
    let end = text.char_indices().nth_back(SHOWN).map_or(0, |(at, c)| at + c.len_utf8());
    if begin < end { format!("{} … {}", &text[..begin], &text[end..]) } else { text.to_owned() }
}

impl From<Broken> for ApiError {
    fn from(broken: Broken) -> Self {
        let message = broken.to_string();
        match broken {
            Broken::Failed(_) => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message).with_code("engine_failed"),
            Broken::Form(_) => ApiError::parameter("response_format", message),
            Broken::Stopped => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("stopping").after(5),
            Broken::Dead => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("engine_ended"),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = self.json().to_string();
        let mut response = (self.status, [(CONTENT_TYPE, "application/json")], body).into_response();
        if let Some(seconds) = self.retry {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_lose_their_middle() {
        let all = "é".repeat(2 * SHOWN);
        assert_eq!(shortened(&all), all);
        assert_eq!(shortened(&format!("a{all}b")), format!("a{} … {}b", &all[..2 * SHOWN - 2], &all[..2 * SHOWN - 2]));
    }
}
