// PTX in one place: every inline assembly statement of the kernels. Each wrapper is one instruction, or the shortest
// sequence that means something. What an architecture lacks is compiled out or replaced as its comment says.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define MEMBER __device__ __forceinline__

// ---- addresses and warps ------------------------------------------------------------------------------------------

DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// ---- conversions ---------------------------------------------------------------------------------------------------

DEVICE float f16_to_f32(u16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
    return result;
}

// Two floats rounded to nearest even as one word, `low` in the low half.
DEVICE u32 f32_to_bf16x2(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Exact where the product is representable, subnormals included. sm_80 has only the fused form.
DEVICE u32 multiply_bf16x2(u32 a, u32 b) {
    u32 product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}

DEVICE u32 f32_to_f16x2(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// ---- programmatic dependent launch (sm_90 up; below, launches are ordered anyway) -----------------------------------

// The next kernel in the stream may start once every block has called this or exited.
DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the previous kernel is complete and its writes are visible.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- loads and stores -----------------------------------------------------------------------------------------------

// 16 bytes of data that nothing writes while the kernel runs and that is read once.
DEVICE uint4 load_streaming(const void* pointer) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(pointer));
    return v;
}

DEVICE u32 load_acquire(const u32* pointer) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(pointer) : "memory");
    return v;
}

DEVICE void store_release(u32* pointer, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" :: "l"(pointer), "r"(value) : "memory");
}

// y += value at the L2 cache, nothing returned; rounds to nearest even, subnormals to zero.
DEVICE void add_global(float* y, float value) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" :: "l"(y), "f"(value) : "memory");
}

#if __CUDA_ARCH__ >= 900
// The same for four values, at a multiple of 16 bytes.
DEVICE void add_global(float* y, const float4& v) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "l"(y), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
#endif

// ---- mma.sync (sm_80 up) --------------------------------------------------------------------------------------------

// d += a b for one m16n8k16 product of 16-bit elements, FP32 accumulation. a: 4 registers, b: 2, d: 4.
DEVICE void mma_m16n8k16(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if ELEMENT_F16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void ldmatrix_x4(u32* r, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

DEVICE void ldmatrix_x4_transposed(u32* r, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// ---- asynchronous copies, per thread (sm_80 up) -----------------------------------------------------------------------

DEVICE void copy_async_16(u32 shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared), "l"(global) : "memory");
}

DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory"); }

// ---- mbarriers ----------------------------------------------------------------------------------------------------------

DEVICE void mbarrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}

DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" :: "r"(barrier) : "memory");
}

// Returns once the phase of this parity is complete.
DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra WAIT;\nDONE:\n}"
        :: "r"(barrier), "r"(parity) : "memory");
#else
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT:\nmbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n@done bra DONE;\nbra WAIT;\nDONE:\n}"
        :: "r"(barrier), "r"(parity) : "memory");
#endif
}

// ---- bulk copies (sm_90 up) ---------------------------------------------------------------------------------------------

#if __CUDA_ARCH__ >= 900
// Makes initialised barriers visible to the copy engine.
DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

// bytes and both addresses are multiples of 16; completes on the barrier.
DEVICE void copy_bulk(u32 shared, const void* global, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared), "l"(global), "r"(bytes), "r"(barrier) : "memory");
}

// Orders ordinary shared-memory stores before what the tensor cores and the copy engine read.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

// ---- named barriers ---------------------------------------------------------------------------------------------------

// Barrier `id` (1 to 15) among `threads` threads.
DEVICE void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// ---- attention for prefill -------------------------------------------------------------------------------------------

// 2^x to about 2 units in the last place; results below 2^-126 are zero.
DEVICE float exp2_approximate(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// 1 / x to about 1 unit in the last place; zero beyond 2^126.
DEVICE float reciprocal_approximate(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// 16 bytes, or zeros (nothing is read then).
DEVICE void copy_async_16_or_zero(u32 shared, const void* global, bool copied) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared), "l"(global), "r"(copied ? 16 : 0) : "memory");
}

DEVICE void store_shared_zero_16(u32 shared) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" :: "r"(shared), "r"(0) : "memory");
}

// Counts this warp in barrier `id` without waiting.
DEVICE void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// An empty statement that defines the registers anew: what uses them later stays after the volatile statements before it.
template <int N>
DEVICE void pin_registers(float (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(values[i]) :: "memory");
}

template <int N>
DEVICE void pin_registers(u32 (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(values[i]) :: "memory");
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Registers per thread of the calling warpgroup from here on; every warp of it calls this.
template <int REGISTERS>
DEVICE void raise_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS)); }

template <int REGISTERS>
DEVICE void lower_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(REGISTERS)); }

// A shared-memory operand of wgmma with the 128-byte swizzle: rows of 128 bytes whose 16-byte chunks are permuted by
// address bits 4-6 ^= bits 7-9, so operands start at multiples of 1024 bytes (offset by whole 32-byte k-steps if K-major).
// Fields: bits 0-13 address / 16, 16-29 leading offset / 16, 32-45 stride offset / 16, 49-51 base offset (0: aligned
// starts), 62-63 swizzle (1: 128 bytes). In 16-bit elements, with r = row of 128 bytes:
//   K-major (transpose bit 0): element (n, k) of 16 k's is at row n, column k; eight rows are 1024 bytes, and the next eight
//     rows are `stride` bytes on. The leading offset is not used (16 k's are inside one row).
//   MN-major (transpose bit 1): element (n, k) is at row k, column n % 64; the next eight k's are `stride` bytes on, the next
//     64 n's `leading` bytes on.
// Adding bytes / 16 to a descriptor moves its start.
DEVICE u64 swizzled_descriptor(u32 shared, u32 leading_bytes, u32 stride_bytes) {
    return static_cast<u64>((shared & 0x3ffffu) >> 4) | static_cast<u64>(leading_bytes >> 4) << 16
           | static_cast<u64>(stride_bytes >> 4) << 32 | 1ull << 62;
}

// Orders accesses to registers (and, after fence_proxy_async, shared memory) before the products that follow.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most PENDING of the committed groups are unfinished; pin what they wrote after this.
template <int PENDING>
DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory"); }

#if ELEMENT_F16
#define WGMMA_TYPES ".f32.f16.f16 "
#else
#define WGMMA_TYPES ".f32.bf16.bf16 "
#endif
#define WGMMA_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_16(d, i) WGMMA_4(d, i), WGMMA_4(d, i + 4), WGMMA_4(d, i + 8), WGMMA_4(d, i + 12)
#define WGMMA_NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_64 \
    WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d[64][128] (+)= a[64][16] b[128][16]^T, both K-major in shared memory; accumulate = false: d is overwritten. A thread
// (warp w, g = lane / 4, t = lane % 4) has d(16w + g + 8h, 8j + 2t + e) in register 4j + 2h + e.
DEVICE void wgmma_m64n128k16(float (&d)[64], u64 a, u64 b, bool accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16" WGMMA_TYPES "{" WGMMA_NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
                 : WGMMA_16(d, 0), WGMMA_16(d, 16), WGMMA_16(d, 32), WGMMA_16(d, 48)
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

// d[64][128] += a[64][16] b[16][128]: a in registers (per warp as in mma_m16n8k16), b MN-major in shared memory.
DEVICE void wgmma_m64n128k16_transposed(float (&d)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16" WGMMA_TYPES
                 "{" WGMMA_NAMES_64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : WGMMA_16(d, 0), WGMMA_16(d, 16), WGMMA_16(d, 32), WGMMA_16(d, 48)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

// The same for 64 columns of b.
DEVICE void wgmma_m64n64k16_transposed(float (&d)[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16" WGMMA_TYPES
                 "{" WGMMA_NAMES_32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : WGMMA_16(d, 0), WGMMA_16(d, 16)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
#endif

// ---- wgmma with A from registers, one width per build (matrix product) ----------------------------------------------------

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && defined(WGMMA_N)
// Per width: shape, names of the N / 2 accumulators, those of A's four registers and of B's descriptor, the accumulators.
#define WGMMA_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_24 WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_NAMES_40 WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_NAMES_48 WGMMA_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES_56 WGMMA_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_NAMES_72 WGMMA_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_NAMES_80 WGMMA_NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_NAMES_88 WGMMA_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_NAMES_96 WGMMA_NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_NAMES_104 WGMMA_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_NAMES_112 WGMMA_NAMES_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_NAMES_120 WGMMA_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_NAMES_128 WGMMA_NAMES_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_8(d, i) WGMMA_4(d, i), WGMMA_4(d, i + 4)
#define WGMMA_32(d, i) WGMMA_16(d, i), WGMMA_16(d, i + 16)
#define WGMMA_64(d, i) WGMMA_32(d, i), WGMMA_32(d, i + 32)
#if WGMMA_N == 16
#define WGMMA_OPERANDS "n16", WGMMA_NAMES_8, "{%8, %9, %10, %11}, %12", WGMMA_8(d, 0)
#elif WGMMA_N == 32
#define WGMMA_OPERANDS "n32", WGMMA_NAMES_16, "{%16, %17, %18, %19}, %20", WGMMA_16(d, 0)
#elif WGMMA_N == 48
#define WGMMA_OPERANDS "n48", WGMMA_NAMES_24, "{%24, %25, %26, %27}, %28", WGMMA_16(d, 0), WGMMA_8(d, 16)
#elif WGMMA_N == 64
#define WGMMA_OPERANDS "n64", WGMMA_NAMES_32, "{%32, %33, %34, %35}, %36", WGMMA_32(d, 0)
#elif WGMMA_N == 80
#define WGMMA_OPERANDS "n80", WGMMA_NAMES_40, "{%40, %41, %42, %43}, %44", WGMMA_32(d, 0), WGMMA_8(d, 32)
#elif WGMMA_N == 96
#define WGMMA_OPERANDS "n96", WGMMA_NAMES_48, "{%48, %49, %50, %51}, %52", WGMMA_32(d, 0), WGMMA_16(d, 32)
#elif WGMMA_N == 112
#define WGMMA_OPERANDS "n112", WGMMA_NAMES_56, "{%56, %57, %58, %59}, %60", WGMMA_32(d, 0), WGMMA_16(d, 32), WGMMA_8(d, 48)
#elif WGMMA_N == 128
#define WGMMA_OPERANDS "n128", WGMMA_NAMES_64, "{%64, %65, %66, %67}, %68", WGMMA_64(d, 0)
#elif WGMMA_N == 144
#define WGMMA_OPERANDS "n144", WGMMA_NAMES_72, "{%72, %73, %74, %75}, %76", WGMMA_64(d, 0), WGMMA_8(d, 64)
#elif WGMMA_N == 160
#define WGMMA_OPERANDS "n160", WGMMA_NAMES_80, "{%80, %81, %82, %83}, %84", WGMMA_64(d, 0), WGMMA_16(d, 64)
#elif WGMMA_N == 176
#define WGMMA_OPERANDS "n176", WGMMA_NAMES_88, "{%88, %89, %90, %91}, %92", WGMMA_64(d, 0), WGMMA_16(d, 64), WGMMA_8(d, 80)
#elif WGMMA_N == 192
#define WGMMA_OPERANDS "n192", WGMMA_NAMES_96, "{%96, %97, %98, %99}, %100", WGMMA_64(d, 0), WGMMA_32(d, 64)
#elif WGMMA_N == 208
#define WGMMA_OPERANDS "n208", WGMMA_NAMES_104, "{%104, %105, %106, %107}, %108", \
    WGMMA_64(d, 0), WGMMA_32(d, 64), WGMMA_8(d, 96)
#elif WGMMA_N == 224
#define WGMMA_OPERANDS "n224", WGMMA_NAMES_112, "{%112, %113, %114, %115}, %116", \
    WGMMA_64(d, 0), WGMMA_32(d, 64), WGMMA_16(d, 96)
#elif WGMMA_N == 240
#define WGMMA_OPERANDS "n240", WGMMA_NAMES_120, "{%120, %121, %122, %123}, %124", \
    WGMMA_64(d, 0), WGMMA_32(d, 64), WGMMA_16(d, 96), WGMMA_8(d, 112)
#elif WGMMA_N == 256
#define WGMMA_OPERANDS "n256", WGMMA_NAMES_128, "{%128, %129, %130, %131}, %132", WGMMA_64(d, 0), WGMMA_64(d, 64)
#else
#error "WGMMA_N is no multiple of 16 up to 256"
#endif
#define WGMMA_STATEMENT(shape, names, inputs, ...) \
    asm volatile("wgmma.mma_async.sync.aligned.m64" shape "k16" WGMMA_TYPES "{" names "}, " inputs ", 1, 1, 1, 0;" \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_EXPAND(...) WGMMA_STATEMENT(__VA_ARGS__)

// d[64][N] += a[64][16] b[N][16]^T: a in registers (per warp as in mma_m16n8k16), b K-major in shared memory.
DEVICE void wgmma(float (&d)[WGMMA_N / 2], const u32 (&a)[4], u64 b) { WGMMA_EXPAND(WGMMA_OPERANDS); }
#endif
