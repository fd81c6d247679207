//! Claims that are missing, have the wrong type, or exclude this time, audience or issuer (RFC
//! 7519, section 4.1).

use serde_json::json;

use crate::front::{TokenCase, TokenFront, case};
use crate::issuer::{
    AUDIENCE, ISSUER, TokenIssuer, appended, claims, claims_with, claims_without, now,
};

/// Tokens with each of these JSON values for a claim.
pub(crate) fn with_claim_values(
    issuer: &TokenIssuer,
    claim: &str,
    texts: &[&str],
) -> Vec<TokenCase> {
    let key = issuer.key("ES256");
    let token =
        |text: &&str| case(format!("{claim}: {text}"), key.claiming(claims_with(claim, text)));
    texts.iter().map(token).collect()
}

#[test]
fn token_without_valid_exp_is_rejected() {
    let issuer = TokenIssuer::new();
    let now = now();
    let seconds = [now - 7200, now - 61].map(|seconds| seconds.to_string());
    let text = format!("\"{}\"", now + 3600);
    let texts: [&str; 20] = [
        &seconds[0],
        &seconds[1],
        &text,
        "1e400",
        "-1e400",
        "-1",
        "-0",
        "0",
        "0.5",
        "null",
        "[]",
        "{}",
        "true",
        "\"\"",
        "\"never\"",
        "[4100000000]",
        "{\"$date\":4100000000}",
        "1e-400",
        "-99999999999999999999999",
        "\"2099-01-01T00:00:00Z\"",
    ];
    let mut cases = with_claim_values(&issuer, "exp", &texts);
    cases.push(case("no exp", issuer.key("ES256").claiming(claims_without("exp"))));
    TokenFront::of(&issuer).assert_rejected(&cases);
}

#[test]
fn token_with_nbf_or_iat_in_the_future_is_rejected() {
    let issuer = TokenIssuer::new();
    let seconds = [now() + 3600, now() + 120].map(|seconds| seconds.to_string());
    let text = format!("\"{}\"", now() - 60);
    let texts: [&str; 10] = [
        &seconds[0],
        &seconds[1],
        &text,
        "1e400",
        "1e300",
        "99999999999999999999999",
        "[]",
        "{}",
        "true",
        "\"\"",
    ];
    TokenFront::of(&issuer).assert_rejected(&with_claim_values(&issuer, "nbf", &texts));
}

#[test]
fn token_for_another_audience_is_rejected() {
    let issuer = TokenIssuer::new();
    let texts = [
        "\"other\"",
        "\"Service\"",
        "\"SERVICE\"",
        "\"service \"",
        "\" service\"",
        "\"servic\"",
        "\"service/\"",
        "\"services\"",
        "\"service,other\"",
        "\"other service\"",
        "\"*\"",
        "\"\"",
        "\"service\\u0000\"",
        "\"https://service\"",
        "1",
        "0",
        "null",
        "true",
        "[]",
        "{}",
        "[\"other\"]",
        "[1]",
        "[1,2,3]",
        "[null]",
        "[[\"service\"]]",
        "{\"service\":true}",
        "{\"0\":\"service\"}",
        "[\"service\",1]",
        "[\"service\",null]",
        "[\"Service\"]",
    ];
    let mut cases = with_claim_values(&issuer, "aud", &texts);
    let key = issuer.key("ES256");
    cases.push(case("no aud", key.claiming(claims_without("aud"))));
    let elsewhere = appended(&claims_without("aud"), "azp", "\"service\"");
    cases.push(case("no aud, but azp", key.claiming(elsewhere)));
    let capital = appended(&claims_without("aud"), "Aud", "\"service\"");
    cases.push(case("no aud, but Aud", key.claiming(capital)));
    TokenFront::of(&issuer).assert_rejected(&cases);
}

#[test]
fn token_of_another_issuer_is_rejected() {
    let issuer = TokenIssuer::new();
    let texts = [
        "\"https://other\"",
        "\"https://issuer/\"",
        "\"https://issuer.example\"",
        "\"https://issue\"",
        "\"https://Issuer\"",
        "\"HTTPS://issuer\"",
        "\"http://issuer\"",
        "\"issuer\"",
        "\"https://issuer \"",
        "\" https://issuer\"",
        "\"https://issuer\\u0000\"",
        "\"https://issuer\\u200b\"",
        "\"https://issuer#x\"",
        "\"https://issuer:443\"",
        "\"\"",
        "\"*\"",
        "1",
        "null",
        "true",
        "[]",
        "{}",
        "[\"https://other\"]",
        "{\"https://issuer\":1}",
        "[[\"https://issuer\"]]",
        "[1]",
    ];
    let mut cases = with_claim_values(&issuer, "iss", &texts);
    cases.push(case("no iss", issuer.key("ES256").claiming(claims_without("iss"))));
    TokenFront::of(&issuer).assert_rejected(&cases);
}

#[test]
fn token_with_a_sub_that_is_no_string_is_rejected() {
    let issuer = TokenIssuer::new();
    let texts = ["1", "0", "true", "[]", "[\"visitor\"]", "{}", "{\"name\":\"visitor\"}", "1.5"];
    TokenFront::of(&issuer).assert_rejected(&with_claim_values(&issuer, "sub", &texts));
}

#[test]
fn token_with_a_duplicate_claim_is_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let later = (now() + 3600).to_string();
    let earlier = (now() - 7200).to_string();
    let us = json!(AUDIENCE).to_string();
    let issued = json!(ISSUER).to_string();
    let twice = |name: &str, json: &str| {
        let payload = appended(&claims().to_string(), name, json);
        case(format!("{name} twice, then {json}"), key.claiming(payload))
    };
    let first_wrong = |name: &str, wrong: &str, right: &str| {
        let payload = appended(&claims_with(name, wrong), name, right);
        case(format!("{name} twice, {wrong} first"), key.claiming(payload))
    };
    TokenFront::of(&issuer).assert_rejected(&[
        twice("exp", &later),
        twice("exp", &earlier),
        twice("\\u0065xp", &later),
        twice("aud", &us),
        twice("aud", "\"other\""),
        twice("iss", &issued),
        twice("iss", "\"https://other\""),
        twice("is\\u0073", &issued),
        twice("sub", "\"visitor\""),
        twice("sub", "\"administrator\""),
        first_wrong("exp", &earlier, &later),
        first_wrong("aud", "\"other\"", &us),
        first_wrong("iss", "\"https://other\"", &issued),
        first_wrong("nbf", &later, "0"),
    ]);
}
