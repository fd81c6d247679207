//! Stores that are damaged, contain invalid entries, or are restored.

use std::os::unix::fs::PermissionsExt as _;

use tempfile::TempDir;
use weft_certs::Authority;

use std::time::{Duration, UNIX_EPOCH};

use super::*;

const DOMAIN: &str = "mesh.test";

fn start() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn web() -> SpiffeId {
    SpiffeId::parse("spiffe://mesh.test/ns/a/sa/web").expect("an id")
}

/// A closed store with many certificates, one of them revoked, and its path.
fn closed() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let files = Authority::create(DOMAIN, start()).expect("an authority");
    let store = Store::create(folder.path(), DOMAIN, &files).expect("a store");
    for serial in 0..300 {
        store.record_issued(&format!("{serial:032x}"), &web(), start(), start()).expect("stored");
    }
    store.revoke(&[format!("{:032x}", 7)], start()).expect("revoked");
    let path = store.path().to_owned();
    (folder, path)
}

/// Opens a folder whose store is damaged, and returns the error. The file must not change, and the error must say how to
/// restore a backup.
fn refused(folder: &Path, name: &str) -> String {
    let path = folder.join(STORE_FILE);
    let before = fs::read(&path).ok();
    let error = Store::open(folder).expect_err(name).to_string();
    assert_eq!(fs::read(&path).ok(), before, "{name}: the file was written to");
    assert_eq!(error.lines().count(), 1, "{name}: {error}");
    assert!(error.starts_with(&format!("{} ", path.display())), "{name}: {error}");
    let command =
        format!("cp -p {} {}", path.with_file_name("weft.redb.backup-1").display(), path.display());
    assert!(error.contains(&command), "{name}: {error}");
    error
}

#[test]
fn damaged_store_is_refused_unchanged_and_its_backup_opens() {
    let (folder, path) = closed();
    drop(Store::open(folder.path()).expect("intact"));
    let whole = fs::read(&path).expect("present");
    let version = |at: usize, version: u8| {
        let mut bytes = whole.clone();
        bytes[at] = version;
        bytes
    };
    let half = whole.len() / 2;
    let cases: [(&str, Vec<u8>, &str); 11] = [
        ("empty", Vec::new(), "is empty"),
        ("one byte", whole[..1].to_vec(), "not a store"),
        ("only the header", whole[..320].to_vec(), "is damaged"),
        ("half", whole[..half].to_vec(), "is damaged"),
        ("without its last page", whole[..whole.len() - 4096].to_vec(), "is damaged"),
        ("zeros", vec![0; whole.len()], "not a store"),
        ("another file", b"{}".repeat(4096), "not a store"),
        (
            "an older version",
            version(64, 2),
            "has format version 2; this version of weft reads format 3",
        ),
        (
            "a newer version",
            version(192, 9),
            "has format version 9; this version of weft reads format 3",
        ),
        (
            "zeros after the header",
            [&whole[..4096], &vec![0; whole.len() - 4096]].concat(),
            "is damaged",
        ),
        ("a layout of large regions", [&whole[..20], &[0xff; 4], &whole[24..]].concat(), "layout"),
    ];
    for (name, bytes, reason) in cases {
        fs::write(&path, bytes).expect("written");
        let error = refused(folder.path(), name);
        assert!(error.contains(reason), "{name}: {error}");
    }
    fs::remove_file(&path).expect("present");
    assert!(refused(folder.path(), "none").contains("is missing"));
    let again =
        Store::create(folder.path(), DOMAIN, &Authority::create(DOMAIN, start()).expect("one"));
    assert!(matches!(again, Err(StoreError::Exists(_))), "a backup counts as a store: {again:?}");
    fs::copy(path.with_file_name("weft.redb.backup-1"), &path).expect("copied");
    let restored = Store::open(folder.path()).expect("intact");
    assert_eq!(restored.revoked().expect("readable").len(), 1);
}

#[test]
fn store_with_changed_bytes_opens_intact_or_is_refused() {
    let (folder, path) = closed();
    let whole = fs::read(&path).expect("present");
    let mut refusals = 0;
    // Unused pages may have any content. A store that opens must have all entries.
    for at in (0..whole.len().min(160 * 4096)).step_by(4099) {
        let mut bytes = whole.clone();
        for (offset, byte) in bytes[at..at + 16].iter_mut().enumerate() {
            *byte ^= u8::try_from(offset * 11 + 0x5a).unwrap_or(1);
        }
        match image::verify(bytes.clone()) {
            Ok(summary) => {
                assert_eq!((summary.issued, summary.revoked), (300, 1), "changed at {at}");
                fs::write(&path, bytes).expect("written");
                let store = Store::open(folder.path()).expect("it was verified");
                assert_eq!(store.list().expect("readable").len(), 300, "changed at {at}");
            }
            Err(reason) => {
                refusals += 1;
                assert_eq!(reason.lines().count(), 1, "changed at {at}: {reason}");
            }
        }
    }
    assert!(refusals > 5, "{refusals} refusals");
}

#[test]
fn each_start_makes_a_verified_backup_and_keeps_the_previous_one() {
    let (folder, path) = closed();
    let store = Store::open(folder.path()).expect("intact");
    let count = |findings: &StoreCheck| -> Vec<usize> {
        findings.backups.iter().map(|(_, held)| held.as_ref().expect("intact").issued).collect()
    };
    assert_eq!(count(&store.check()), [300, 0], "of this start, and of the one before");
    store.record_issued("ab", &web(), start(), start()).expect("stored");
    assert_eq!(store.check().store.expect("intact").issued, 301, "while it is in use");
    drop(store);
    drop(Store::open(folder.path()).expect("intact"));
    let findings = Store::check_closed(folder.path()).expect("closed");
    assert_eq!(count(&findings), [301, 300]);
    for (backup, _) in findings.backups {
        let mode = fs::metadata(backup).expect("present").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "it holds the authority's keys");
    }
    assert_eq!(fs::metadata(&path).expect("present").permissions().mode() & 0o777, 0o600);
    // A damaged file never replaces a backup.
    fs::write(&path, b"").expect("written");
    drop(refused(folder.path(), "empty"));
    let findings = Store::check_closed(folder.path()).expect("closed");
    assert_eq!(count(&findings), [301, 300]);
    assert!(findings.store.expect_err("it is empty").contains("is empty"));
}

#[test]
fn unreadable_revocation_is_an_error() {
    let (folder, path) = closed();
    let store = Store::open(folder.path()).expect("intact");
    let damage = |write: &WriteTransaction| {
        write.open_table(REVOKED)?.insert("0a", u64::MAX)?;
        Ok(())
    };
    store.write(damage).expect("written");
    let error = store.revoked().expect_err("out of range").to_string();
    assert!(error.contains("invalid entry of revocation \"0a\""), "{error}");
    drop(store);
    let error = refused(folder.path(), "a time out of range");
    assert!(error.contains("revocation \"0a\""), "{error}");
    // A missing table is an error.
    fs::copy(path.with_file_name("weft.redb.backup-1"), &path).expect("copied");
    let store = Store::open(folder.path()).expect("intact");
    store.write(|write| Ok(write.delete_table(REVOKED).map(drop)?)).expect("deleted");
    assert!(store.revoked().is_err() && store.list().is_err());
    drop(store);
    drop(refused(folder.path(), "without the table of revocations"));
}

#[test]
fn replaced_file_is_detected_and_opened_again() {
    let (folder, path) = closed();
    let store = Store::open(folder.path()).expect("intact");
    let aside = path.with_file_name("aside");
    fs::rename(&path, &aside).expect("moved");
    let error = store.revoke(&["0b".into()], start()).expect_err("the file was moved").to_string();
    assert!(error.contains("removed or replaced while in use"), "{error}");
    assert!(store.problem().is_some());
    fs::rename(&aside, &path).expect("moved back");
    let deadline = Duration::from_secs(10);
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        while store.problem().is_some() {
            std::thread::yield_now();
        }
        drop(sender.send(store));
    });
    let store = receiver.recv_timeout(deadline).expect("opened again");
    store.revoke(&["0b".into()], start()).expect("revoked");
    assert_eq!(store.revoked().expect("readable").len(), 2);
}

#[test]
fn expired_certificates_revocations_and_tokens_are_deleted_a_day_later() {
    const HOUR: Duration = Duration::from_secs(3600);
    let folder = tempfile::tempdir().expect("a folder");
    let files = Authority::create(DOMAIN, start()).expect("an authority");
    let store = Store::create(folder.path(), DOMAIN, &files).expect("a store");
    let issue = |serial: &str, hours: u32, at: SystemTime| {
        store.record_issued(serial, &web(), at + HOUR * hours, at).expect("stored");
    };
    let held = || {
        let revoked = store.revoked().expect("readable");
        let issued = store.list().expect("readable");
        let serials = |all: Vec<String>| all.join(" ");
        (
            serials(issued.into_iter().map(|one| one.serial).collect()),
            serials(revoked.into_iter().map(|one| one.serial).collect()),
            store.is_token_valid("old", start()).expect("readable"),
        )
    };
    let after = |hours: u32| start() + HOUR * hours;
    issue("01", 1, start());
    issue("02", 100, start());
    store.add_token("old", &web(), after(1)).expect("stored");
    // The expiry of a certificate that was not issued here is unknown.
    store.revoke(&["01", "02", "ff"].map(str::to_owned), start()).expect("revoked");
    issue("03", 100, after(24));
    assert_eq!(held(), ("01 02 03".into(), "01 02 ff".into(), true), "within the retention time");
    issue("04", 100, after(26));
    assert_eq!(held(), ("01 02 03 04".into(), "01 02 ff".into(), true), "expired at one run only");
    issue("05", 100, after(26));
    assert_eq!(held().0, "01 02 03 04 05", "deleted at most once an hour");
    issue("06", 100, after(28));
    assert_eq!(held(), ("02 03 04 05 06".into(), "02 ff".into(), false));
    // One run with a clock that is ahead deletes nothing.
    issue("07", 1, after(24 * 365));
    issue("08", 100, after(30));
    assert_eq!(held().1, "02 ff");
    issue("09", 100, after(32));
    assert_eq!(held().1, "02 ff");
}
