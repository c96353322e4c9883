// Stand-ins for symbols that newer releases of glibc and libstdc++ export under new
// versions, so that older distributions can load a library built with them. All are hidden
// outside this library. `packaging/floor.py` reports a missing one.
#include <new>  // defines __GLIBC__ and __GLIBCXX__

#if defined(__GLIBC__) && defined(__GLIBCXX__)

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <sstream>

#define STAND_IN(declaration, symbol)                                           \
  extern "C" __attribute__((visibility("hidden"))) declaration __asm__(symbol); \
  declaration

// glibc 2.32: whether reference counts need no atomic instructions. False: XLA has threads.
STAND_IN(char single_threaded, "__libc_single_threaded");

#if defined(__x86_64__) || defined(__aarch64__)
// glibc 2.33; inline before. Here the kernel's struct stat is the same as glibc's.
STAND_IN(int status(const char* path, struct stat* found), "stat") {
  return static_cast<int>(syscall(SYS_newfstatat, AT_FDCWD, path, found, 0));
}
#endif

// libstdc++ 11; std::bad_alloc reported such a length before.
STAND_IN(void throw_bad_array_new_length(), "_ZSt28__throw_bad_array_new_lengthv") {
  throw std::bad_alloc();
}

// libstdc++ 12; an older version of the symbol has the same name.
STAND_IN(void wait(std::condition_variable* changed, std::unique_lock<std::mutex>* lock),
         "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE") {
  pthread_cond_wait(changed->native_handle(), lock->mutex()->native_handle());
}

// libstdc++ 9, for XLA's headers; before, the header had it, with the mode as an argument.
STAND_IN(void construct(void* stream),
         "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev") {
  new (stream) std::stringstream(std::ios_base::in | std::ios_base::out);
}

// libstdc++ 11; before, only the whole copy and the whole destruction were exported.
extern "C" void copy(void* to, const std::exception_ptr* from) __asm__(
    "_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
extern "C" void destroy(std::exception_ptr* pointer) __asm__(
    "_ZNSt15__exception_ptr13exception_ptrD1Ev");

STAND_IN(void add_reference(std::exception_ptr* pointer),
         "_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv") {
  alignas(std::exception_ptr) std::byte never_destroyed[sizeof(std::exception_ptr)];
  copy(never_destroyed, pointer);
}

STAND_IN(void release(std::exception_ptr* pointer),
         "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv") {
  destroy(pointer);
}

#endif
