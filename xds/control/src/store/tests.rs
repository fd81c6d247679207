//! Stores that are damaged, filled with what cannot be read, or restored.

use std::os::unix::fs::PermissionsExt as _;

use tempfile::TempDir;
use weft_certs::Authority;

use super::*;

const DOMAIN: &str = "mesh.test";

fn start() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn web() -> SpiffeId {
    SpiffeId::parse("spiffe://mesh.test/ns/a/sa/web").expect("an id")
}

/// A closed store in which one of many certificates is revoked, and its file.
fn closed() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let files = Authority::create(DOMAIN, start()).expect("an authority");
    let store = Store::create(folder.path(), DOMAIN, &files).expect("a store");
    for serial in 0..300 {
        store
            .record_issued(&format!("{serial:032x}"), &web(), start(), start())
            .expect("it is stored");
    }
    store.revoke(&[format!("{:032x}", 7)], start()).expect("it is revoked");
    let path = store.path().to_owned();
    (folder, path)
}

/// Opens a folder whose store is damaged: the file must stay as it is, and the reason say how to restore it.
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
    drop(Store::open(folder.path()).expect("it is whole"));
    let whole = fs::read(&path).expect("it is there");
    let version = |at: usize, version: u8| {
        let mut bytes = whole.clone();
        bytes[at] = version;
        bytes
    };
    let half = whole.len() / 2;
    let cases: [(&str, Vec<u8>, &str); 11] = [
        ("empty", Vec::new(), "is empty"),
        ("one byte", whole[..1].to_vec(), "not a store"),
        ("only the head", whole[..320].to_vec(), "is damaged"),
        ("half", whole[..half].to_vec(), "is damaged"),
        ("without its last page", whole[..whole.len() - 4096].to_vec(), "is damaged"),
        ("zeros", vec![0; whole.len()], "not a store"),
        ("another file", b"{}".repeat(4096), "not a store"),
        ("an older version", version(64, 2), "has format version 2; this weft reads version 3"),
        ("a newer version", version(192, 9), "has format version 9; this weft reads version 3"),
        (
            "zeros behind the head",
            [&whole[..4096], &vec![0; whole.len() - 4096]].concat(),
            "is damaged",
        ),
        ("a layout of large regions", [&whole[..20], &[0xff; 4], &whole[24..]].concat(), "layout"),
    ];
    for (name, bytes, reason) in cases {
        fs::write(&path, bytes).expect("it can be written");
        let error = refused(folder.path(), name);
        assert!(error.contains(reason), "{name}: {error}");
    }
    fs::remove_file(&path).expect("it is there");
    assert!(refused(folder.path(), "none").contains("is missing"));
    let again =
        Store::create(folder.path(), DOMAIN, &Authority::create(DOMAIN, start()).expect("one"));
    assert!(matches!(again, Err(StoreError::Exists(_))), "a backup is an authority: {again:?}");
    fs::copy(path.with_file_name("weft.redb.backup-1"), &path).expect("it can be copied");
    let restored = Store::open(folder.path()).expect("it is whole");
    assert_eq!(restored.revoked().expect("it can be read").len(), 1);
}

#[test]
fn store_with_changed_bytes_anywhere_opens_whole_or_is_refused() {
    let (folder, path) = closed();
    let whole = fs::read(&path).expect("it is there");
    let mut refusals = 0;
    // Pages that hold nothing may hold anything: what opens has lost nothing.
    for at in (0..whole.len().min(160 * 4096)).step_by(4099) {
        let mut bytes = whole.clone();
        for (offset, byte) in bytes[at..at + 16].iter_mut().enumerate() {
            *byte ^= u8::try_from(offset * 11 + 0x5a).unwrap_or(1);
        }
        match image::verify(bytes.clone()) {
            Ok(summary) => {
                assert_eq!((summary.issued, summary.revoked), (300, 1), "changed at {at}");
                fs::write(&path, bytes).expect("it can be written");
                let store = Store::open(folder.path()).expect("it was verified");
                assert_eq!(store.list().expect("it can be read").len(), 300, "changed at {at}");
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
fn each_start_keeps_a_verified_backup_and_the_one_before() {
    let (folder, path) = closed();
    let store = Store::open(folder.path()).expect("it is whole");
    let count = |findings: &StoreCheck| -> Vec<usize> {
        findings
            .backups
            .iter()
            .map(|(_, held)| held.as_ref().expect("it is whole").issued)
            .collect()
    };
    assert_eq!(count(&store.check()), [300, 0], "of the start, and of the one before it");
    store.record_issued("ab", &web(), start(), start()).expect("it is stored");
    assert_eq!(store.check().store.expect("it is whole").issued, 301, "while it is in use");
    drop(store);
    drop(Store::open(folder.path()).expect("it is whole"));
    let findings = Store::check_closed(folder.path()).expect("it is closed");
    assert_eq!(count(&findings), [301, 300]);
    for (backup, _) in findings.backups {
        let mode = fs::metadata(backup).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "it holds the authority's keys");
    }
    assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o600);
    // A damaged file never replaces a backup.
    fs::write(&path, b"").expect("it can be written");
    drop(refused(folder.path(), "empty"));
    let findings = Store::check_closed(folder.path()).expect("it is closed");
    assert_eq!(count(&findings), [301, 300]);
    assert!(findings.store.expect_err("it is empty").contains("is empty"));
}

#[test]
fn unreadable_revocation_is_an_error_and_not_the_absence_of_one() {
    let (folder, path) = closed();
    let store = Store::open(folder.path()).expect("it is whole");
    let damage = |write: &WriteTransaction| {
        write.open_table(REVOKED)?.insert("0a", u64::MAX)?;
        Ok(())
    };
    store.write(damage).expect("it can be written");
    let error = store.revoked().expect_err("no clock shows that time").to_string();
    assert!(error.contains("the entry of revocation \"0a\" cannot be read"), "{error}");
    drop(store);
    let error = refused(folder.path(), "a time that no clock shows");
    assert!(error.contains("revocation \"0a\""), "{error}");
    // Without the table there is no telling what it held.
    fs::copy(path.with_file_name("weft.redb.backup-1"), &path).expect("it can be copied");
    let store = Store::open(folder.path()).expect("it is whole");
    store.write(|write| Ok(write.delete_table(REVOKED).map(drop)?)).expect("it can be deleted");
    assert!(store.revoked().is_err() && store.list().is_err());
    drop(store);
    drop(refused(folder.path(), "without the table of revocations"));
}

#[test]
fn replaced_file_is_noticed_while_in_use_and_its_successor_opened() {
    let (folder, path) = closed();
    let store = Store::open(folder.path()).expect("it is whole");
    let aside = path.with_file_name("aside");
    fs::rename(&path, &aside).expect("it can be moved");
    let error = store.revoke(&["0b".into()], start()).expect_err("it would be lost").to_string();
    assert!(error.contains("removed or replaced while it was in use"), "{error}");
    assert!(store.problem().is_some());
    fs::rename(&aside, &path).expect("it can be moved back");
    let deadline = Duration::from_secs(10);
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        while store.problem().is_some() {
            std::thread::yield_now();
        }
        drop(sender.send(store));
    });
    let store = receiver.recv_timeout(deadline).expect("it is opened again");
    store.revoke(&["0b".into()], start()).expect("it works again");
    assert_eq!(store.revoked().expect("it can be read").len(), 2);
}

#[test]
fn expired_certificates_revocations_and_tokens_are_deleted_a_day_later() {
    const HOUR: Duration = Duration::from_secs(3600);
    let folder = tempfile::tempdir().expect("a folder");
    let files = Authority::create(DOMAIN, start()).expect("an authority");
    let store = Store::create(folder.path(), DOMAIN, &files).expect("a store");
    let issue = |serial: &str, hours: u32, at: SystemTime| {
        store.record_issued(serial, &web(), at + HOUR * hours, at).expect("it is stored");
    };
    let held = || {
        let revoked = store.revoked().expect("they can be read");
        let issued = store.list().expect("they can be read");
        let serials = |all: Vec<String>| all.join(" ");
        (
            serials(issued.into_iter().map(|one| one.serial).collect()),
            serials(revoked.into_iter().map(|one| one.serial).collect()),
            store.is_token_valid("old", start()).expect("it can be read"),
        )
    };
    let after = |hours: u32| start() + HOUR * hours;
    issue("01", 1, start());
    issue("02", 100, start());
    store.add_token("old", &web(), after(1)).expect("it is stored");
    // The end of a certificate that was not issued here is not known.
    store.revoke(&["01", "02", "ff"].map(str::to_owned), start()).expect("they are revoked");
    issue("03", 100, after(24));
    assert_eq!(held(), ("01 02 03".into(), "01 02 ff".into(), true), "within the margin");
    issue("04", 100, after(26));
    assert_eq!(held(), ("01 02 03 04".into(), "01 02 ff".into(), true), "once seen as expired");
    issue("05", 100, after(26));
    assert_eq!(held().0, "01 02 03 04 05", "looked for at most once an hour");
    issue("06", 100, after(28));
    assert_eq!(held(), ("02 03 04 05 06".into(), "02 ff".into(), false));
    // By a clock that was ahead once, nothing is deleted before its time.
    issue("07", 1, after(24 * 365));
    issue("08", 100, after(30));
    assert_eq!(held().1, "02 ff");
    issue("09", 100, after(32));
    assert_eq!(held().1, "02 ff");
}
