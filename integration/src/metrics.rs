//! Values of metrics pages.

/// The sum of the series that `selector` selects, such as `weft_agent_refused_total{reason="limit"}`: those of that
/// name that have these labels, and perhaps others. None where the page has no metric of that name; 0 where
/// the metric has no such series.
///
/// # Panics
/// A value is not an integer.
#[must_use]
pub fn find_metric(page: &str, selector: &str) -> Option<u64> {
    let (name, labels) = split(selector);
    let declared = format!("# TYPE {name} ");
    page.lines().find(|line| line.starts_with(&declared))?;
    let labels: Vec<&str> = labels.split("\",").map(|label| label.trim_end_matches('"')).collect();
    let series = page.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (other, has) = split(series);
        let has: Vec<&str> = has.split("\",").map(|label| label.trim_end_matches('"')).collect();
        let is_selected = labels.iter().all(|label| label.is_empty() || has.contains(label));
        (other == name && is_selected).then(|| value.parse::<u64>().expect("an integer"))
    });
    Some(series.sum())
}

/// As [`find_metric`].
///
/// # Panics
/// The page has no metric of that name.
#[must_use]
#[track_caller]
pub fn metric(page: &str, selector: &str) -> u64 {
    let found = find_metric(page, selector);
    assert!(found.is_some(), "no metric {selector} in {page}");
    found.unwrap_or_default()
}

/// A series as its name and its labels, without the braces.
fn split(series: &str) -> (&str, &str) {
    series.strip_suffix('}').and_then(|s| s.split_once('{')).unwrap_or((series, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metric_is_the_sum_of_selected_series() {
        let page = "# TYPE a_total counter\na_total{x=\"1\",y=\"1\"} 2\na_total{x=\"1\",y=\"2\"} 3\n\
                    # TYPE b gauge\nb 7\n# TYPE c_total counter\n";
        assert_eq!(metric(page, "a_total{x=\"1\"}"), 5);
        assert_eq!(metric(page, "a_total{y=\"2\",x=\"1\"}"), 3);
        assert_eq!(metric(page, "a_total{x=\"2\"}"), 0);
        assert_eq!(metric(page, "a_total"), 5);
        assert_eq!(metric(page, "b"), 7);
        assert_eq!(find_metric(page, "c_total"), Some(0));
        assert_eq!(find_metric(page, "d"), None);
    }
}
