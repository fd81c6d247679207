//! Claims that are missing, of another kind, or not good here and now (RFC 7519, section 4.1).

use serde_json::json;

use crate::front::{Case, Front, case};
use crate::issuer::{
    AUDIENCE, ISSUER, Issuer, appended, claims, claims_saying, claims_without, now,
};

/// Tokens that say each of these, in JSON, of a claim.
pub(crate) fn saying(issuer: &Issuer, claim: &str, texts: &[&str]) -> Vec<Case> {
    let key = issuer.key("ES256");
    let token =
        |text: &&str| case(format!("{claim}: {text}"), key.claiming(claims_saying(claim, text)));
    texts.iter().map(token).collect()
}

#[test]
fn a_token_ends() {
    let issuer = Issuer::new();
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
    let mut cases = saying(&issuer, "exp", &texts);
    cases.push(case("no exp", issuer.key("ES256").claiming(claims_without("exp"))));
    Front::of(&issuer).refuses(&cases);
}

#[test]
fn a_token_begins() {
    let issuer = Issuer::new();
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
    Front::of(&issuer).refuses(&saying(&issuer, "nbf", &texts));
}

#[test]
fn a_token_is_for_us() {
    let issuer = Issuer::new();
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
    let mut cases = saying(&issuer, "aud", &texts);
    let key = issuer.key("ES256");
    cases.push(case("no aud", key.claiming(claims_without("aud"))));
    let elsewhere = appended(&claims_without("aud"), "azp", "\"service\"");
    cases.push(case("no aud, but azp", key.claiming(elsewhere)));
    let capital = appended(&claims_without("aud"), "Aud", "\"service\"");
    cases.push(case("no aud, but Aud", key.claiming(capital)));
    Front::of(&issuer).refuses(&cases);
}

#[test]
fn a_token_is_of_the_issuer() {
    let issuer = Issuer::new();
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
    let mut cases = saying(&issuer, "iss", &texts);
    cases.push(case("no iss", issuer.key("ES256").claiming(claims_without("iss"))));
    Front::of(&issuer).refuses(&cases);
}

#[test]
fn a_subject_is_a_text() {
    let issuer = Issuer::new();
    let texts = ["1", "0", "true", "[]", "[\"visitor\"]", "{}", "{\"name\":\"visitor\"}", "1.5"];
    Front::of(&issuer).refuses(&saying(&issuer, "sub", &texts));
}

#[test]
fn a_claim_stands_once() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let (later, earlier) = ((now() + 3600).to_string(), (now() - 7200).to_string());
    let (us, issued) = (json!(AUDIENCE).to_string(), json!(ISSUER).to_string());
    let twice = |name: &str, json: &str| {
        let payload = appended(&claims().to_string(), name, json);
        case(format!("{name} twice, then {json}"), key.claiming(payload))
    };
    let first_wrong = |name: &str, wrong: &str, right: &str| {
        let payload = appended(&claims_saying(name, wrong), name, right);
        case(format!("{name} twice, {wrong} first"), key.claiming(payload))
    };
    Front::of(&issuer).refuses(&[
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
