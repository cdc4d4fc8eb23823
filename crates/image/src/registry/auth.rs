//! Logging in to a registry: answering the challenge that it gives with `401 Unauthorized` (RFC 9110, section 11.6.1;
//! the distribution project's "Token Authentication Specification" and "OAuth2 Token Authentication").

use http_auth::parser::ChallengeParser;
use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};

/// Who we are to a registry.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    Anonymous,
    /// A user, and a password or an access token in its place.
    Basic {
        user: String,
        password: String,
    },
    /// What some registries give at login instead: good for getting tokens, and for nothing else.
    IdentityToken(String),
}

/// What a registry wants to see.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A token of its token server.
    Bearer { realm: String, service: Option<String> },
    /// The user's name and password with every request.
    Basic,
}

impl Challenge {
    /// The challenge in an answer, the one for a token before all others; `None` if there is none that we know.
    pub(super) fn find(headers: &HeaderMap) -> Option<Challenge> {
        let values = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let mut found = None;
        for challenge in values.flat_map(|value| ChallengeParser::new(value).map_while(Result::ok)) {
            let parameter = |name: &str| {
                let mut parameters = challenge.params.iter();
                parameters
                    .find(|(key, _)| key.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value.to_unescaped())
            };
            if challenge.scheme.eq_ignore_ascii_case("bearer") {
                if let Some(realm) = parameter("realm") {
                    return Some(Challenge::Bearer { realm, service: parameter("service") });
                }
            } else if challenge.scheme.eq_ignore_ascii_case("basic") {
                found = Some(Challenge::Basic);
            }
        }
        found
    }
}

/// How to ask a token server for a token.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum TokenRequest {
    /// By GET, with the user's name and password where there are some.
    Get(Url),
    /// By POST with this form: an identity token is too precious for a URL, which servers log.
    Post(Url, String),
}

impl TokenRequest {
    /// Asks for the right to pull from the repository. Credentials go to a server in the clear only if that is how the
    /// registry itself is spoken to.
    ///
    /// # Errors
    /// Why the challenge cannot be answered.
    pub(super) fn new(
        realm: &str,
        service: Option<&str>,
        repository: &str,
        credentials: &Credentials,
        in_the_clear: bool,
    ) -> Result<TokenRequest, String> {
        let mut url: Url = realm.parse().map_err(|_| "it names a token server that is no URL".to_owned())?;
        match url.scheme() {
            "https" => {}
            "http" if in_the_clear => {}
            _ => return Err(format!("it names a token server that is not reached by https: {realm}")),
        }
        let scope = format!("repository:{repository}:pull");
        match credentials {
            Credentials::Anonymous | Credentials::Basic { .. } => {
                let mut query = url.query_pairs_mut();
                query.append_pair("scope", &scope).extend_pairs(service.map(|service| ("service", service)));
                drop(query);
                Ok(TokenRequest::Get(url))
            }
            Credentials::IdentityToken(token) => {
                // A form has the syntax of a query.
                let mut form = url.clone();
                form.query_pairs_mut()
                    .clear()
                    .extend_pairs([
                        ("grant_type", "refresh_token"),
                        ("client_id", "kapsel"),
                        ("scope", &scope),
                    ])
                    .extend_pairs(service.map(|service| ("service", service)))
                    .append_pair("refresh_token", token);
                Ok(TokenRequest::Post(url, form.query().unwrap_or_default().to_owned()))
            }
        }
    }
}

/// The token in a token server's reply, as an `Authorization` header.
///
/// # Errors
/// What is wrong with the reply. The reply itself may have secrets, and is not shown.
pub(super) fn bearer(reply: &[u8]) -> Result<HeaderValue, String> {
    /// Servers give the token by either name, or by both.
    #[derive(serde::Deserialize)]
    struct Reply {
        token: Option<String>,
        access_token: Option<String>,
    }
    let no_token = || "its token server gives a reply without a token".to_owned();
    let reply: Reply = serde_json::from_slice(reply).map_err(|_| no_token())?;
    let named = [reply.token, reply.access_token].into_iter().flatten();
    let token = named.into_iter().find(|token| !token.is_empty()).ok_or_else(no_token)?;
    let mut header = HeaderValue::try_from(format!("Bearer {token}"))
        .map_err(|_| "its token server gives a token that no header can carry".to_owned())?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn challenge(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, value.parse().unwrap());
        }
        Challenge::find(&headers)
    }

    #[test]
    fn finds_the_challenge_that_it_can_answer_best() {
        let bearer = |service: Option<&str>| {
            Some(Challenge::Bearer {
                realm: "https://auth.test/token".into(),
                service: service.map(str::to_owned),
            })
        };
        let full = r#"Bearer realm="https://auth.test/token",service="a \"b\"",scope="repository:x:pull""#;
        assert_eq!(challenge(&[full]), bearer(Some("a \"b\"")));
        assert_eq!(challenge(&[r#"Basic realm="x", bearer REALM="https://auth.test/token""#]), bearer(None));
        assert_eq!(challenge(&["basic realm=x", full]), bearer(Some("a \"b\"")));
        assert_eq!(challenge(&["Basic realm=\"x\""]), Some(Challenge::Basic));
        for unknown in
            [&[][..], &[""], &["Bearer service=\"x\""], &["Negotiate"], &["Digest realm=\"x\""], &["\"=,"]]
        {
            assert_eq!(challenge(unknown), None, "{unknown:?}");
        }
    }

    #[test]
    fn asks_for_the_right_to_pull_and_nothing_else() {
        let realm = "https://auth.test/token?a=b";
        let get = TokenRequest::new(realm, Some("a&b"), "some/tool", &Credentials::Anonymous, false);
        let url = "https://auth.test/token?a=b&scope=repository%3Asome%2Ftool%3Apull&service=a%26b";
        assert_eq!(get, Ok(TokenRequest::Get(url.parse().unwrap())));
        let identity = Credentials::IdentityToken("se=cret".into());
        let post = TokenRequest::new(realm, None, "tool", &identity, false);
        let form = "grant_type=refresh_token&client_id=kapsel&scope=repository%3Atool%3Apull&refresh_token=se%3Dcret";
        assert_eq!(post, Ok(TokenRequest::Post(realm.parse().unwrap(), form.into())));
    }

    #[test]
    fn sends_no_secrets_in_the_clear() {
        let anywhere = |realm: &str, in_the_clear| {
            TokenRequest::new(realm, None, "x", &Credentials::Anonymous, in_the_clear).is_ok()
        };
        assert!(anywhere("https://auth.test/", false) && anywhere("http://127.0.0.1:1/", true));
        for bad in ["http://auth.test/", "file:///etc/passwd", "ftp://auth.test/", "/token", ""] {
            assert!(!anywhere(bad, false), "{bad}");
        }
    }

    #[test]
    fn takes_a_token_by_either_name() {
        let token =
            |reply: &str| bearer(reply.as_bytes()).ok().map(|header| header.to_str().unwrap().to_owned());
        for reply in [
            r#"{"token":"abc","expires_in":60}"#,
            r#"{"access_token":"abc"}"#,
            r#"{"token":"abc","access_token":"def"}"#,
            r#"{"token":"","access_token":"abc"}"#,
        ] {
            assert_eq!(token(reply).as_deref(), Some("Bearer abc"), "{reply}");
        }
        for reply in ["", "{}", "[]", r#"{"token":""}"#, r#"{"token":"a\nb"}"#, r#"{"token":7}"#] {
            assert_eq!(token(reply), None, "{reply}");
        }
    }
}
