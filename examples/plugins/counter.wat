;; A plugin that counts: `add` adds one to the number of that name, `get` gives it. Both answer with 8 bytes,
;; little-endian. It is granted `kvstore`. Written by hand, it needs no compiler: a PluginHost takes the text as it is.

(module
  (import "persistency" "fail" (func $fail (param i32 i32) (result i64)))
  (import "persistency" "kv_get" (func $kv_get (param i32 i32 i32 i32) (result i64)))
  (import "persistency" "kv_compare_and_set"
    (func $kv_compare_and_set (param i32 i32 i32 i32 i32 i32) (result i64)))

  ;; 0: the number that is stored; 8: the one that shall be; 32: texts; 1024: what the host passes to a function.
  (memory (export "memory") 1)
  (data (i32.const 32) "no number can be read under that name")

  ;; Each call has an instance of its own, and is passed one argument: so there is one place for it.
  (func (export "alloc") (param $size i32) (result i32)
    (if (i32.gt_u (local.get $size) (i32.const 64512)) (then (return (i32.const 0))))
    (i32.const 1024))

  ;; Put the number at 0, and give the length of what is stored: 8, or -1 (ABSENT as a length) where nothing is.
  (func $read (param $name i32) (param $size i32) (result i32)
    (local $found i64)
    (i64.store (i32.const 0) (i64.const 0))
    (local.set $found
      (call $kv_get (local.get $name) (local.get $size) (i32.const 0) (i32.const 8)))
    (if (i64.eq (local.get $found) (i64.const -1)) (then (return (i32.const -1))))  ;; NOT_FOUND
    (if (i64.ne (local.get $found) (i64.const 8)) (then (return (i32.const 0))))    ;; not of ours, or an error
    (i32.const 8))

  (func $failed (result i64)
    (drop (call $fail (i32.const 32) (i32.const 37)))
    (i64.const -1))

  (func $answer (param $at i32) (result i64)
    (i64.or (i64.shl (i64.extend_i32_u (local.get $at)) (i64.const 32)) (i64.const 8)))

  (func (export "get") (param $name i32) (param $size i32) (result i64)
    (if (i32.eqz (call $read (local.get $name) (local.get $size))) (then (return (call $failed))))
    (call $answer (i32.const 0)))

  (func (export "add") (param $name i32) (param $size i32) (result i64)
    (local $stored i32)
    (local $done i64)
    (loop $again
      (local.set $stored (call $read (local.get $name) (local.get $size)))
      (if (i32.eqz (local.get $stored)) (then (return (call $failed))))
      (i64.store (i32.const 8) (i64.add (i64.load (i32.const 0)) (i64.const 1)))
      (local.set $done
        (call $kv_compare_and_set
          (local.get $name) (local.get $size)
          (i32.const 0) (local.get $stored)
          (i32.const 8) (i32.const 8)))
      (br_if $again (i64.eqz (local.get $done))))  ;; another call was faster: look again
    (if (i64.lt_s (local.get $done) (i64.const 0)) (then (return (i64.const -1))))
    (call $answer (i32.const 8))))
